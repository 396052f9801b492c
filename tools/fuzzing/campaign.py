"""Inputs drawn by hypothesis, shared out over the parsers."""

import contextlib

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fuzzing import of_core, of_data, of_families, of_models
from fuzzing.edits import edited, edited_bytes, edits_of_bytes, edits_of_values
from fuzzing.limits import release
from fuzzing.runner import Fault, try_input

LEAST = 20
"""Inputs of a parser at least."""

FORGIVING = frozenset({"training digests", "caption"})
"""Parsers that refuse nothing: a checkpoint that is damaged is passed over, and any text is a caption."""


def all_parsers(examples):
    """Every parser, with its folder."""
    modules = (of_core, of_models, of_data, of_families)
    return [parser for module in modules for parser in module.parsers(examples)]


def shares(parsers, inputs):
    """Each parser with its number of inputs: by the inverse of the root of what one costs."""
    weights = [parser.cost**-0.5 for parser in parsers]
    return [
        (parser, max(LEAST, round(inputs * weight / sum(weights))))
        for parser, weight in zip(parsers, weights)
    ]


def contents(parser):
    """Strategy of a parser's inputs: a seed with edits of its values and of its bytes."""
    if parser.form == "bytes":
        return st.builds(
            lambda which, data: edited_bytes(parser.seeds[which], data),
            st.integers(0, len(parser.seeds) - 1),
            edits_of_bytes,
        )
    return st.builds(
        lambda which, values, data: edited_bytes(
            parser.write(edited(parser.seeds[which], values)), data
        ),
        st.integers(0, len(parser.seeds) - 1),
        edits_of_values,
        st.one_of(st.just([]), st.just([]), st.just([]), edits_of_bytes),
    )


def campaign(parser, count, start, tally, stop=False):
    """Try so many inputs.

    Args:
        start: seed of the draws.
        stop: at the first fault, which hypothesis makes small; else all inputs are tried.

    Raises:
        Fault: there was one and `stop` is set.
    """
    phases = [Phase.generate, Phase.shrink] if stop else [Phase.generate]
    seed(start)(trial(parser, tally, stop, max_examples=count, phases=phases))()
    release()


def trial(parser, tally, stop=False, **drawn):
    """A test of hypothesis that tries inputs; see `campaign`.

    Args:
        drawn: further settings of hypothesis.
    """

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck), **drawn)
    @given(contents(parser))
    def tried(content):
        with contextlib.nullcontext() if stop else contextlib.suppress(Fault):
            try_input(parser, content, tally)

    return tried
