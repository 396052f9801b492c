"""Allocation of ranks against a search through all of them."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc.formats.low_rank_sizes import factors_are_smaller, largest_smaller_rank, rank_range
from emloc.linalg.allocation import Candidate, allocate, predicted_error


@st.composite
def layers(draw, same_cost=False):
    """Two to four layers of up to six eigenvalues."""
    cost = draw(st.integers(1, 9))
    found = {}
    for number in range(draw(st.integers(2, 4))):
        values = draw(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6))
        values.sort(reverse=True)
        uniform = draw(st.integers(1, len(values)))
        found[f"layer {number}"] = Candidate(
            values,
            total=sum(values) + draw(st.floats(1e-3, 10)),
            uniform=uniform,
            least=draw(st.integers(1, uniform)),
            cost=cost if same_cost else draw(st.integers(1, 9)),
            sensitivity=draw(st.floats(1e-3, 1)),
        )
    return found


def spent(candidates, ranks):
    return sum(one.cost * ranks[name] for name, one in candidates.items())


def uniform(candidates):
    return {name: one.uniform for name, one in candidates.items()}


def error(candidates, ranks):
    """Squared, written out once more."""
    total = 0.0
    for name, one in candidates.items():
        tail = one.total - sum(one.values[: ranks[name]])
        total += one.sensitivity * tail / (one.total - sum(one.values[: one.uniform]))
    return total


def best(candidates, budget):
    """The least error of all ranks that spend at most `budget`."""
    spans = [range(one.least, len(one.values) + 1) for one in candidates.values()]
    every = (dict(zip(candidates, ranks)) for ranks in product(*spans))
    return min(error(candidates, r) for r in every if spent(candidates, r) <= budget)


@settings(deadline=None, max_examples=150)
@given(layers(same_cost=True))
def test_no_allocation_is_better_where_all_ranks_cost_the_same(candidates):
    ranks = allocate(candidates)
    found, budget = error(candidates, ranks), spent(candidates, uniform(candidates))
    assert spent(candidates, ranks) == budget
    assert found == pytest.approx(best(candidates, budget), rel=1e-9)


@settings(deadline=None, max_examples=150)
@given(layers())
def test_within_one_rank_of_the_best_where_costs_differ(candidates):
    ranks = allocate(candidates)
    budget, largest = (
        spent(candidates, uniform(candidates)),
        max(one.cost for one in candidates.values()),
    )
    assert spent(candidates, ranks) <= budget
    found = error(candidates, ranks)
    assert found <= error(candidates, uniform(candidates)) * (1 + 1e-9)
    least = sum(one.cost * one.least for one in candidates.values())
    assert found <= best(candidates, max(least, budget - largest)) * (1 + 1e-9)
    assert found >= best(candidates, budget) * (1 - 1e-9)
    assert predicted_error(candidates, ranks) == pytest.approx(found**0.5)
    for name, one in candidates.items():
        assert one.least <= ranks[name] <= len(one.values)


@given(layers(), st.floats(1e-6, 1e6))
def test_the_size_of_a_layers_outputs_does_not_matter(candidates, factor):
    name, one = next(iter(candidates.items()))
    power = 2.0 ** round(factor).bit_length()  # so that nothing is rounded
    scaled = Candidate(
        [value * power for value in one.values], one.total * power, one.uniform, one.least,
        one.cost, one.sensitivity,
    )  # fmt: skip
    assert allocate({**candidates, name: scaled}) == allocate(candidates)


def test_parameters_go_where_the_hidden_state_minds():
    flat = Candidate([1.0] * 8, 16.0, 4, 1, 10, sensitivity=0.01)
    steep = Candidate([1.0] * 8, 16.0, 4, 1, 10, sensitivity=0.03)
    assert allocate({"a": flat, "b": steep}) == {"a": 1, "b": 7}
    assert allocate({"b": steep, "a": flat}) == {"a": 1, "b": 7}


def test_layers_of_which_nothing_is_known_keep_their_rank():
    whole = Candidate([2.0, 1.0], 3.0, 2, 1, 10, sensitivity=0.0)  # loses nothing
    unseen = Candidate([2.0, 1.0, 0.5], 4.0, 1, 1, 10, sensitivity=0.0)
    dead = Candidate([0.0, 0.0], 0.0, 1, 1, 10, sensitivity=0.0)
    others = {"x": Candidate([9.0, 8.0, 7.0], 30.0, 2, 1, 10, sensitivity=1.0)}
    ranks = allocate({"whole": whole, "unseen": unseen, "dead": dead, **others})
    assert ranks == {"whole": 2, "unseen": 1, "dead": 1, "x": 2}
    assert allocate({}) == {}


@given(st.integers(2, 400), st.integers(2, 400), st.floats(0.01, 0.99))
def test_the_range_holds_the_uniform_rank_and_no_factors_as_large_as_the_weight(d_out, d_in, ratio):
    from emloc.formats.low_rank_sizes import rank_for

    rank = rank_for(ratio, d_out, d_in)
    largest = largest_smaller_rank(d_out, d_in)
    assert not factors_are_smaller(largest + 1, d_out, d_in)
    if factors_are_smaller(rank, d_out, d_in):  # others stay dense
        assert factors_are_smaller(largest, d_out, d_in)
        least, most = rank_range(rank, d_out, d_in)
        assert 1 <= least <= rank <= most <= min(largest, 3 * rank)
