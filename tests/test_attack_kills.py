"""Whenever a stage is killed, its disk fails or another process writes the same, nothing is lost.

`tools/attack_kills.py` does it to all families; its record is in `tools/records/kills.md`.
"""

import sys
from pathlib import Path
from random import Random

import pytest

from emloc.testing import plugin_installed

TOOLS = str(Path(__file__).parents[1] / "tools")
KILLS = 30


@pytest.mark.long
def test_30_attacks_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    for name in ("HF_HUB_OFFLINE", "TQDM_DISABLE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # the tool's own choice, and no later test's
    from attack_kills import attack, subject_of

    from attacks.attempts import ALL

    with plugin_installed("emloc.testing.toy_plugin"):
        subject = subject_of("toy", tmp_path)
        ends, lost = attack(subject, tmp_path / "attacks", KILLS, Random(0))
    assert not lost
    assert sum(ends.values()) == KILLS
    assert {end.split(": ")[1] for end in ends} == set(ALL)
    assert any(": killed" in end for end in ends)
    assert any(": refused" in end for end in ends)
    for name in [name for name in sys.modules if name.partition(".")[0].startswith("attack")]:
        del sys.modules[name]
