"""One input: written, read within limits, judged. Only success or a documented error is right."""

import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field

from emloc.errors import EmlocError
from emloc.machine.progress import console
from fuzzing.limits import TooLong, TooMuch, limited


@dataclass
class Tally:
    """What became of a parser's inputs.

    Attributes:
        outcomes: accepted, refused, and what else there was.
        faults: by where they arose, one example each.
    """

    outcomes: Counter[str] = field(default_factory=Counter[str])
    faults: dict[str, bytes] = field(default_factory=dict[str, bytes])
    said: dict[str, str] = field(default_factory=dict[str, str])

    def as_json(self):
        """What `of_json` reads."""
        faults = {where: content.hex() for where, content in self.faults.items()}
        return {"outcomes": self.outcomes, "faults": faults, "said": self.said}

    @classmethod
    def of_json(cls, content):
        """The tally of another process."""
        faults = {where: bytes.fromhex(text) for where, text in content["faults"].items()}
        return cls(Counter(content["outcomes"]), faults, content["said"])


class Fault(AssertionError):
    """Neither success nor a documented error, or success without meaning."""


def try_input(parser, content, tally):
    """Read one input.

    Raises:
        Fault: it was neither accepted with its meaning nor refused in one sentence.
    """
    (parser.folder / parser.file).write_bytes(content)
    kind, where, problem = _outcome(parser)
    tally.outcomes[kind] += 1
    if kind not in ("accepted", "refused"):
        tally.faults.setdefault(f"{kind} at {where}", content)
        tally.said.setdefault(f"{kind} at {where}", str(problem)[:160])
        raise Fault(f"{parser.name}: {kind} at {where} for {content[:300]!r}") from problem


def _outcome(parser):
    with warnings.catch_warnings(), console.capture():
        warnings.simplefilter("ignore")
        try:
            with limited():
                result = parser.read(parser.folder)
        except EmlocError as problem:
            sentence = str(problem)
            bad = not sentence.strip() or "Traceback" in sentence
            return ("no sentence", _where(problem), problem) if bad else ("refused", "", None)
        except (TooLong, TooMuch) as problem:
            kind = "too long" if isinstance(problem, TooLong) else "too much memory"
            return kind, _where(problem), problem
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as problem:
            return f"traceback of {type(problem).__name__}", _where(problem), problem
        try:
            parser.means(parser.folder, result)
        except Exception as problem:
            return "accepted without meaning", _where(problem), problem
    return "accepted", "", None


def _where(problem):
    """The last line of EMLoC's own, or of ours."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [f for f in frames if "/emloc" in f.filename and "site-packages" not in f.filename]
    own = own or [f for f in frames if "/fuzzing/of_" in f.filename] or frames
    last = own[-1]
    if last.filename.endswith("runner.py"):
        last = frames[-1]
    file = last.filename.rpartition("/src/")[2].rpartition("/tools/")[2]
    return f"{file}:{last.lineno} ({type(problem).__name__})"
