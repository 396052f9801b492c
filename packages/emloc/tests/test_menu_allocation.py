"""Options for layers against brute force."""

from itertools import pairwise, product

from hypothesis import given, settings
from hypothesis import strategies as st

from emloc.linalg.menu_allocation import Option, allocate_bytes, lower_hull

OPTIONS = st.lists(
    st.builds(Option, st.integers(1, 40), st.floats(0, 10, allow_subnormal=False)),
    min_size=1,
    max_size=4,
)


def spent(layers, chosen):
    return sum(layers[name][index].bytes for name, index in chosen.items())


def error(layers, chosen):
    return sum(layers[name][index].error for name, index in chosen.items())


@settings(max_examples=300, deadline=None)
@given(st.lists(OPTIONS, min_size=1, max_size=4), st.integers(1, 170))
def test_nothing_of_as_many_bytes_is_better_by_more_than_one_step(lists, budget):
    layers = {f"layer{n}": options for n, options in enumerate(lists)}
    chosen = allocate_bytes(layers, budget)
    least = sum(min(options).bytes for options in lists)
    assert spent(layers, chosen) <= max(budget, least)
    if least > budget:
        assert spent(layers, chosen) == least
        return
    every = [dict(zip(layers, places)) for places in product(*(range(len(o)) for o in lists))]
    best = min(error(layers, one) for one in every if spent(layers, one) <= budget)
    # The continuous optimum lies below; the choice is at most one step of the hulls above it.
    steps = [
        options[a].error - options[b].error
        for options in lists
        for a, b in pairwise(lower_hull(options))
    ]
    assert error(layers, chosen) <= best + max(steps, default=0) + 1e-9


@settings(max_examples=300, deadline=None)
@given(st.lists(OPTIONS, min_size=1, max_size=4), st.integers(1, 170))
def test_what_is_spent_is_spent_best(lists, budget):
    """Before what is left over goes to steps out of their order, the choice is the optimum for its bytes."""
    layers = {f"layer{n}": options for n, options in enumerate(lists)}
    chosen = allocate_bytes(layers, budget)
    used = spent(layers, chosen)
    again = allocate_bytes(layers, used)
    assert error(layers, again) <= error(layers, chosen) + 1e-9


def test_the_hull_leaves_out_what_lies_above():
    options = [Option(10, 5.0), Option(20, 4.0), Option(30, 1.0), Option(40, 1.0), Option(10, 6.0)]
    assert lower_hull(options) == [0, 2]


def test_bytes_go_where_they_take_most_error_away():
    layers = {
        "calm": [Option(10, 1.0), Option(20, 0.5), Option(40, 0.0)],
        "nervous": [Option(10, 9.0), Option(20, 4.0), Option(40, 1.0)],
    }
    assert allocate_bytes(layers, 20) == {"calm": 0, "nervous": 0}
    assert allocate_bytes(layers, 30) == {"calm": 0, "nervous": 1}
    assert allocate_bytes(layers, 50) == {"calm": 0, "nervous": 2}
    assert allocate_bytes(layers, 80) == {"calm": 2, "nervous": 2}
