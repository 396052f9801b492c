import pytest
from hypothesis import given
from hypothesis import strategies as st

from emloc.errors import ConfigError
from emloc.formats.low_rank_sizes import decide, rank_for
from emloc.options.patterns import match_pattern


@given(st.floats(0.01, 1.0), st.integers(2, 5000), st.integers(2, 5000))
def test_rank_is_the_largest_within_the_ratio(ratio, d_out, d_in):
    rank = rank_for(ratio, d_out, d_in)
    budget = ratio * d_out * d_in
    assert rank == 1 or rank * (d_out + d_in) <= budget * (1 + 1e-12)
    assert (rank + 1) * (d_out + d_in) > budget * (1 - 1e-12)


def test_layers_that_would_not_shrink_stay_dense():
    assert decide("a.q", 64, 32, 1.0, {}) == (None, "keep_ratio 1")
    assert decide("a.q", 2, 2, 0.1, {}).rank is None
    assert "not be smaller" in decide("a.q", 2, 2, 0.1, {}).reason
    assert decide("a.q", 64, 32, 0.5, {}).rank == 10


def test_patterns_match_the_end_of_a_name_and_the_first_wins():
    ratios = {"mlp.down": 0.9, r"0\.mlp\..*": 0.2}
    assert match_pattern(ratios, "model.layers.0.mlp.down") == 0.9
    assert match_pattern(ratios, "model.layers.0.mlp.up") == 0.2
    assert match_pattern(ratios, "model.layers.10.mlp.up") is None
    assert decide("x.mlp.up", 100, 100, 0.1, {}).rank == 5
    assert decide("x.mlp.up", 100, 100, 0.5, {"up": 300}).rank == 100


def test_bad_pattern_is_one_sentence():
    with pytest.raises(ConfigError, match="not a regular expression"):
        match_pattern({"(": 1}, "a")
