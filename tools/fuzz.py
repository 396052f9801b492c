"""Fuzz all that EMLoC reads: valid files with a few edits must be read rightly, or refused in a sentence.

    python tools/fuzz.py --inputs 2000
    python tools/fuzz.py --inputs 100000 --seed 1 --only adapter
    python tools/fuzz.py --inputs 100000 --engine atheris  # pip install atheris

Prints one line per parser and, by place, each fault with an example; ends with 1 if there was any.
"""

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

from emloc.machine.progress import quiet_libraries
from fuzzing.campaign import all_parsers, campaign, shares
from fuzzing.examples import Examples
from fuzzing.runner import Tally


def in_child(work):
    """The tally of work done in a process of its own: a library that crashes takes no others with it.

    Args:
        work: gets a function that hands over its tally and ends the process.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writing, "w") as file:

            def finish(tally):
                json.dump(tally.as_json(), file)
                file.flush()
                os._exit(0)

            try:
                work(finish)
            except (
                BaseException
            ):  # what it unwinds here is the parent's, the folder of all parsers too
                traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as file:
        content = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return Tally.of_json(json.loads(content))
    tally = Tally()
    tally.outcomes["crash"] = 1
    where = f"crash of the process ({status})"
    tally.faults[where], tally.said[where] = b"", "the input is the parser's file as it was left"
    return tally


def drawn(parser, count, seed, finish):
    """Inputs that hypothesis draws."""
    tally = Tally()
    campaign(parser, count, seed, tally)
    finish(tally)


def steered(parser, count, seed, finish):
    """Inputs that atheris steers."""
    from fuzzing.guided import guided

    guided(parser, count, seed, Tally(), finish)


ENGINES = {"hypothesis": drawn, "atheris": steered}


def main():
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--inputs", type=int, default=2000, help="of all parsers together")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", default="", help="parsers whose names begin so")
    options.add_argument(
        "--faults", type=Path, help="folder that takes each fault's input as a file"
    )
    options.add_argument("--engine", choices=ENGINES, default="hypothesis")
    given = options.parse_args()
    kept = given.faults and given.faults.absolute()
    engine = ENGINES[given.engine]
    logging.disable(logging.CRITICAL)
    quiet_libraries()
    failed, total = 0, Tally()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        gc.collect()
        gc.freeze()  # what is imported stays, and children need not look through it
        parsers = [
            p for p in all_parsers(Examples(Path(folder) / "x")) if p.name.startswith(given.only)
        ]
        for parser, count in shares(parsers, given.inputs):
            started = time.monotonic()
            tally = in_child(partial(engine, parser, count, given.seed))
            shown = ", ".join(f"{number} {kind}" for kind, number in tally.outcomes.most_common())
            print(f"{parser.name}: {shown} ({time.monotonic() - started:.1f} s)", flush=True)
            for where, content in tally.faults.items():
                print(f"    {where}: {tally.said[where]}\n        {content[:160]!r}", flush=True)
                if kept:
                    kept.mkdir(parents=True, exist_ok=True)
                    (kept / f"{failed:03}-{parser.name.replace(' ', '-')}").write_bytes(content)
                failed += 1
            total.outcomes.update(tally.outcomes)
    print("all:", ", ".join(f"{number} {kind}" for kind, number in total.outcomes.most_common()))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
