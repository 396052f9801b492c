"""Patterns of names: what they match is what `re` matches, and none of them takes long."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from emloc.errors import ConfigError
from emloc.options.compress import CompressConfig
from emloc.options.patterns import match_pattern, require_affordable

NAMES = [
    f"model.layers.{i}.{part}" for i in (0, 1, 11) for part in ("self_attn.q_proj", "mlp.down_proj")
]
SLOW = [
    ".*" * 30 + "!", "(a+)+$", "(.*)*!", "(a|a)*b", "(a|ab|b)*c", "a{0,60000}" * 9, "a?" * 30, "(a|a)" * 30,
    "(?=(.*)*)x", "(?:x+x+)+y", r"(\w*)*\1", "((((.*)*)*)*)*",
]  # fmt: skip


@pytest.mark.parametrize("pattern", SLOW)
def test_patterns_that_could_take_for_ever_are_refused_at_once(pattern):
    started = time.process_time()
    with pytest.raises(ConfigError, match="could match a name in too many ways"):
        match_pattern({pattern: 3}, "a" * 200)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "pattern", ["(", "[", "*q", "a{99999999999}", "(" * 5000 + ")" * 5000, "x" * 3000]
)
def test_what_is_no_regular_expression_is_refused(pattern):
    with pytest.raises(ConfigError, match="is not a regular expression"):
        match_pattern({pattern: 3}, "a")


PARTS = ["q_proj", "down_proj", ".*", r"\.", r"\d+", "layers", "(0|1)", "self_attn", "[a-z]*", "^", "model",
         "x?", r"(?:mlp|self_attn)", r"(?!.*mlp)", "11", "."]  # fmt: skip


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("".join), st.sampled_from(NAMES)
)
def test_matches_are_those_of_re(pattern, name):
    expected = bool(re.match(rf"(.*\.)?({pattern})$", name))
    try:
        assert (match_pattern({pattern: 1}, name) is not None) == expected
    except ConfigError:
        assert pattern.count("*") + pattern.count("+") + pattern.count("?") > 3


def test_many_names_make_a_pattern_dear():
    require_affordable([".*attn.*q_proj", ".*mlp.*"], NAMES * 30)
    require_affordable([rf"^model\.layers\.{i}\.q_proj" for i in range(3000)], ["a" * 60] * 3000)
    with pytest.raises(ConfigError, match="could match 200 names of up to 900 characters"):
        require_affordable([".*a.*b.*"], ["a" * 900] * 200)


@pytest.mark.parametrize("option", ["rank_pattern", "keep_ratio_pattern"])
def test_options_with_such_patterns_are_refused_before_any_work(option):
    with pytest.raises(ValidationError, match="too many ways"):
        CompressConfig(model_name_or_path="m", output_dir="o", **{option: {"(a+)+": 1}})
