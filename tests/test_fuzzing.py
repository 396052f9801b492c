"""Whatever stands in a file, it is read rightly or refused in one sentence, soon and with little memory.

`tools/fuzz.py` tries more of the same; its record is in `tools/records/fuzzing.md`.
"""

import sys
from pathlib import Path

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
