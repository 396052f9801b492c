"""Processes of Python for tests, with the libraries imported before they begin.

Torch, transformers and PEFT take ten seconds to import, and a command on a tiny model takes one. A server
imports them once and forks: what runs is a process of its own, with its own arguments, folder, environment,
streams, memory, signals and exit code. Tests of what starting itself does (which modules an import loads,
which plugins lie on the path) start a fresh interpreter instead.
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORTED = [
    "emloc.cli",
    "emloc.stages.run",
    "emloc_llm.family",
    "emloc_llm.training",
    "emloc_llm.evaluation",
    "emloc_vlm.family",
    "emloc_diffusion.training",
    "emloc_diffusion.evaluation",
]


def run_python(*arguments, cwd=None, env=None):
    """`python ARGUMENTS` as `subprocess.run(…, capture_output=True, text=True)` would return it.

    The arguments begin with `-m MODULE`, `-c CODE` or a script's path.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    given = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "stdout"), Path(folder, "stderr")
        process = context.Process(
            target=_begin,
            args=(given, str(cwd or Path.cwd()), dict(env or os.environ), *map(str, streams)),
        )
        process.start()
        process.join()
        texts = [path.read_text("utf-8") for path in streams]
    return subprocess.CompletedProcess([sys.executable, *given], process.exitcode, *texts)


def forked_python(command):
    """`subprocess.run(command, stdout=DEVNULL)` for what `run_python` runs and starts Python itself."""
    executable, *given = command
    assert executable == sys.executable
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_begin, args=(given, ".", dict(os.environ), os.devnull))
    process.start()
    process.join()
    return subprocess.CompletedProcess(command, process.exitcode)


def _begin(arguments, folder, environment, *streams):
    gc.freeze()  # every stage collects several times, and need not look through imported libraries
    for number, path in enumerate(streams, start=1):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    kind, *rest = arguments
    if kind == "-m":
        sys.argv, sys.path = rest, [folder, *sys.path]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        code, *rest = rest
        sys.argv, sys.path = ["-c", *rest], [folder, *sys.path]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")
