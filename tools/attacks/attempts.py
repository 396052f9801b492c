"""One attack: a stage is disturbed, what it leaves is looked at, and the same call is made again."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import emloc
from attacks.faults import KINDS, LIMIT, SIGNALS, install
from attacks.subjects import content, difference
from emloc.errors import EmlocError, OutputError

SECONDS = 240
"""A stage that takes longer hangs."""
KNOWN_SIGNS = (".partial", ".lock")
"""Ends of what a killed run may leave beside its output, for the same call to go on with."""


class Lost(AssertionError):
    """Something broken was called complete, left behind, or said in the wrong way."""


def in_child(work):
    """What a function did in a process of its own: its exit code or signal, and what it said."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(SECONDS)  # by default, it ends the process
        _mute()
        said = {"ended": "ok"}
        try:
            said["steps"] = work()
        except EmlocError as problem:
            cause = problem.__cause__
            said = {"ended": "refused", "kind": type(problem).__name__, "says": str(problem),
                    "expected": isinstance(problem, OutputError), "cause": repr(cause)}  # fmt: skip
        except KeyboardInterrupt:
            said = {"ended": "interrupted"}
        except BaseException as problem:
            said = {"ended": "traceback", "says": f"{type(problem).__name__}: {problem}"}
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        text = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(text) if text else {"ended": "killed", "signal": -code}


def _mute():
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def undisturbed(call, place):
    """The result of a call that nothing disturbs, and how many steps it took."""

    def work():
        steps = install(None, place, None)
        call(place / "out")
        return steps.count

    place.mkdir(parents=True)
    said = in_child(work)
    if said["ended"] != "ok":
        raise Lost(f"the stage itself fails: {said}")
    return content(place / "out"), said["steps"], sorted(path.name for path in place.iterdir())


def disturb(call, place, kind, at, expected, listing):
    """Disturb a call, look, and make it again.

    Raises:
        Lost: with what was lost.
    """
    place.mkdir(parents=True)

    def work():
        install(kind, place, at)
        call(place / "out")

    said = in_child(work)
    _require_said_rightly(kind, said)
    if (
        (place / "out").exists()
        and content(place / "out") != expected
        and any((place / "out").iterdir())
    ):
        complete = (place / "out/emloc.json").exists() or (place / "out/evaluation.json").exists()
        if complete:
            raise Lost(f"what {kind} at step {at} left is under its final name and another: {said}")
    again = in_child(lambda: _made_and_verified(call, place / "out"))
    if again["ended"] != "ok":
        raise Lost(f"after {kind} at step {at}, the same call fails: {again}")
    other = difference(content(place / "out"), expected)
    if other:
        raise Lost(f"after {kind} at step {at}, the same call makes something else: {other}")
    left = sorted(path.name for path in place.iterdir())
    if left != listing:
        raise Lost(f"after {kind} at step {at}, {set(left) ^ set(listing)} is there or is not")
    shutil.rmtree(place)
    return said["ended"]


def _made_and_verified(call, folder):
    call(folder)
    if (folder / "emloc.json").exists():
        emloc.verify(path=str(folder))


def _require_said_rightly(kind, said):
    ended = said["ended"]
    if ended == "traceback":
        raise Lost(f"{kind} ends in a traceback: {said['says']}")
    if ended == "killed" and said["signal"] not in (SIGNALS.get(kind), signal.SIGKILL):
        raise Lost(f"{kind} ends by the signal {said['signal']}")
    if ended == "refused":
        if not said["expected"] or kind in SIGNALS:
            raise Lost(f"{kind} is called {said['kind']}: {said['says']} ({said['cause']})")
        if "\n" in said["says"] or (kind == LIMIT and "disk is full" in said["says"]):
            raise Lost(f"{kind} is said wrongly: {said['says']}")


def race(call, place, disguise, delay, expected, listing):
    """Two processes make the same call at once, the second under another name of the output.

    Raises:
        Lost: both failed, one fails otherwise than by giving way, or the result is another.
    """
    (place / "sub").mkdir(parents=True)
    elsewhere = place.with_name(place.name + "-elsewhere")
    elsewhere.mkdir()
    link = place.with_name(place.name + "-link")
    link.symlink_to(place)

    def second():
        time.sleep(delay)
        os.chdir(place)
        if disguise == "another TMPDIR":
            os.environ["TMPDIR"] = str(elsewhere)
            import tempfile

            tempfile.tempdir = None
        names = {
            "sub/..": place / "sub" / ".." / "out", "a linked parent": link / "out",
            "a relative path": Path("out"), "another TMPDIR": place / "out",
        }  # fmt: skip
        call(names[disguise])

    first = os.fork()
    if first == 0:
        _mute()
        try:
            call(place / "out")
            os._exit(0)
        except OutputError:
            os._exit(7)
        except BaseException:
            os._exit(1)
    said = in_child(second)
    code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    gave_way = said["ended"] == "refused" and said["expected"]
    if code not in (0, 7) or not (said["ended"] == "ok" or gave_way) or (code and gave_way):
        raise Lost(f"two processes, {disguise}: the first ended with {code}, the second: {said}")
    other = difference(content(place / "out"), expected)
    if other:
        raise Lost(f"two processes, {disguise}: the result is another: {other}")
    left = sorted(path.name for path in place.iterdir())
    if left != sorted([*listing, "sub"]):
        raise Lost(f"two processes, {disguise}: {left} is left")
    shutil.rmtree(place)
    shutil.rmtree(elsewhere)
    link.unlink()
    return f"first {code}, second {said['ended']}"


DISGUISES = ("sub/..", "a linked parent", "a relative path", "another TMPDIR")
ALL = (*KINDS, *DISGUISES)
