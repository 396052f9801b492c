"""Counts of how often each block of a model runs in one forward.

Most models run every block once. ALBERT has one block for all depths, and models that loop go through all of
theirs again; what such a block reads is summed over all of its runs before it is fitted. The first pass
counts them, and a file keeps the counts for the passes that follow and for a run that goes on.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from emloc.artefacts.json_files import read_json
from emloc.artefacts.small_files import write_json

RUNS = "runs.json"


def write_runs(work: Path, runs: Counter[str]) -> None:
    """Keep the counts of a whole forward, by the names of blocks."""
    write_json(work / RUNS, dict(runs))


def known_runs(work: Path) -> Mapping[str, int] | None:
    """The counts that an earlier pass kept; None where none did. Blocks that no sample needs are left out."""
    return read_json(work / RUNS) if (work / RUNS).is_file() else None


def runs_in(work: Path) -> list[str]:
    """Name of the file of counts in a folder, which only a continuation needs."""
    return [path.name for path in work.glob(RUNS)]
