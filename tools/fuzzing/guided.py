"""Inputs that atheris steers to code which no input has reached yet, through the draws of hypothesis.

`pip install atheris`; only this engine needs it.
"""

import gc
import sys
import tempfile
from pathlib import Path
from random import Random
from types import FunctionType

from fuzzing import limits
from fuzzing.campaign import trial
from fuzzing.runner import Tally, try_input

LONGEST = 1024
"""Bytes that hypothesis draws one input from, at most."""

SLOWER = 3
"""Times that code which is watched takes, at most."""

FIRST = 20
"""Inputs drawn at random that atheris begins with."""


def watch_own_code():
    """Have every function of EMLoC that is loaded tell atheris where it goes."""
    import atheris

    gc.unfreeze()  # what is frozen is not listed
    for thing in gc.get_objects():
        if type(thing) is FunctionType and str(thing.__module__).startswith("emloc"):
            atheris.instrument_func(thing)


def guided(parser, count, start, tally, done):
    """Try so many inputs; never returns, as atheris does not.

    Args:
        done: takes the tally in the end, and ends the process.
    """
    import atheris

    # What is imported where it is first needed must be there to be watched.
    seed = parser.seeds[0]
    try_input(parser, seed if parser.form == "bytes" else parser.write(seed), Tally())
    watch_own_code()
    limits.SECONDS *= SLOWER
    draw = trial(parser, tally).hypothesis.fuzz_one_input

    def one(data):
        if sum(tally.outcomes.values()) >= count:
            done(tally)
        draw(data)

    random = Random(start)
    corpus = Path(tempfile.mkdtemp(prefix="corpus", dir="."))
    for number in range(FIRST):
        (corpus / str(number)).write_bytes(random.randbytes(LONGEST // 2))
    options = [f"-seed={start + 1}", f"-max_len={LONGEST}", "-len_control=0", "-rss_limit_mb=0"]
    atheris.Setup([sys.argv[0], str(corpus), "-verbosity=0", *options], one)
    atheris.Fuzz()
