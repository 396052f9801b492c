"""Whatever stands in a file, it is read rightly or refused in one sentence, soon and with little memory.

`tools/fuzz.py` tries more of the same; its record is in `tools/records/fuzzing.md`.
"""

import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

TOOLS = str(Path(__file__).parents[1] / "tools")
INPUTS = 2000


@pytest.fixture
def fuzzing(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    from fuzzing import campaign

    yield campaign
    for name in [name for name in sys.modules if name.partition(".")[0] == "fuzzing"]:
        del sys.modules[name]


@pytest.mark.long
def test_edited_files_are_read_rightly_or_refused(fuzzing, tmp_path, monkeypatch):
    from fuzzing.examples import Examples
    from fuzzing.runner import Tally

    monkeypatch.chdir(tmp_path)
    total = Tally()
    for parser, count in fuzzing.shares(fuzzing.all_parsers(Examples(tmp_path / "x")), INPUTS):
        tally = Tally()
        fuzzing.campaign(parser, count, 0, tally)
        if tally.faults:
            fuzzing.campaign(parser, count, 0, Tally(), stop=True)  # makes the first of them small
        assert not tally.faults, tally.said
        assert tally.outcomes["refused"] or parser.name in fuzzing.FORGIVING, parser.name
        total.outcomes.update(tally.outcomes)
    assert total.outcomes["accepted"] > INPUTS / 10  # or the edits would leave nothing to be read
    assert total.outcomes.total() >= INPUTS


def test_atheris_steers_the_same_trial_over_watched_code(fuzzing, tmp_path, monkeypatch):
    """A stand-in for atheris: it draws at random, and knows which functions are watched."""
    from fuzzing.examples import Examples
    from fuzzing.guided import guided
    from fuzzing.runner import Tally

    class Done(BaseException):
        pass

    def done(tally):
        raise Done

    watched, random = [], Random(0)
    atheris = SimpleNamespace(
        instrument_func=watched.append,
        Setup=lambda options, one: setattr(atheris, "one", one),
        Fuzz=lambda: [atheris.one(random.randbytes(512)) for _ in range(10**4)],
    )
    monkeypatch.setitem(sys.modules, "atheris", atheris)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fuzzing.limits.SECONDS", 2.0)
    parsers = fuzzing.all_parsers(Examples(tmp_path / "x"))
    [parser] = [parser for parser in parsers if parser.name == "figures"]
    tally = Tally()
    with pytest.raises(Done):
        guided(parser, 30, 0, tally, done)
    assert sum(tally.outcomes.values()) == 30
    assert tally.outcomes["refused"] > 0
    assert {function.__module__.partition(".")[0] for function in watched} >= {"emloc"}
    assert "_known" in {function.__name__ for function in watched}
