"""Kill stages at their steps, fail their disk, run two at once: nothing may be lost, or be called complete.

    python tools/attack_kills.py --kills 300
    python tools/attack_kills.py --kills 30 --families toy --seed 1

Every attack disturbs one stage of one family once (SIGKILL, SIGTERM, SIGINT, ENOSPC, EIO, a file that is torn
in the middle, a limit on the size of files; or a second process under another name of the output), looks at
what is there, makes the same call again and compares the result with that of a run that nothing disturbed.
Ends with 1 if anything was lost.
"""

import argparse
import contextlib
import gc
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from attacks.attempts import ALL, DISGUISES, Lost, disturb, race, undisturbed
from attacks.subjects import calls
from emloc.extend.capabilities import example_of
from emloc.extend.plugins import family_named
from emloc.machine.progress import console
from emloc.testing import plugin_installed
from emloc.testing.contract import Subject

FAMILIES = ("toy", "llm", "vlm", "diffusion")


def subject_of(family: str, root: Path) -> Subject:
    """A family's tiny example with the artefacts of all stages."""
    (root / family).mkdir(parents=True)
    example = example_of(family_named(family), root / family)
    made = Subject(family, root / f"{family}-stages", example, {"compress": {"format": "low_rank"}})
    assert made.stages
    return made


def attack(subject: Subject, root: Path, kills: int, draw: Random) -> tuple[Counter, list[str]]:
    """So many attacks on a family's stages in turn; what each ended in, and what was lost."""
    known = {
        stage: (call, *undisturbed(call, root / stage / "whole"))
        for stage, call in calls(subject).items()
    }
    ends, lost = Counter(), []
    for number in range(kills):
        stage = list(known)[number % len(known)]
        kind = ALL[(number // len(known) + number) % len(ALL)]
        call, expected, steps, listing = known[stage]
        place = root / stage / f"{number:04}"
        try:
            if kind in DISGUISES:
                ended = race(call, place, kind, draw.random() * 0.3, expected, listing)
            else:
                ended = disturb(call, place, kind, draw.randint(1, steps), expected, listing)
            ends[f"{stage}: {kind}: {ended}"] += 1
        except Lost as problem:
            lost.append(f"{subject.family.name} {stage}: {problem}")
    return ends, lost


def main() -> None:
    """Attack all families."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--kills", type=int, default=300, help="attacks on all families together")
    options.add_argument("--families", default=",".join(FAMILIES))
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    logging.disable(logging.CRITICAL)
    names, lost, done = given.families.split(","), [], 0
    toy = (
        plugin_installed("emloc.testing.toy_plugin") if "toy" in names else contextlib.nullcontext()
    )
    with tempfile.TemporaryDirectory() as folder, toy:
        for position, family in enumerate(names):
            started, root = time.monotonic(), Path(folder).resolve() / family
            with console.capture():
                subject = subject_of(family, root)
            gc.collect()
            gc.freeze()
            kills = given.kills // len(names) + (position < given.kills % len(names))
            ends, missing = attack(subject, root / "attacks", kills, Random(given.seed))
            done += kills
            lost += missing
            print(
                f"{family}: {kills} attacks in {time.monotonic() - started:.0f} s, {len(missing)} lost"
            )
            for what, count in sorted(ends.items()):
                print(f"    {count} {what}")
            print("".join(f"    LOST: {what}\n" for what in missing), end="", flush=True)
    print(f"{done} attacks, {len(lost)} lost")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
