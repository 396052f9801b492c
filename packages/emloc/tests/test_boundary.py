"""Whatever leaves a stage is an error of ours, with the exception that it was as its cause."""

import errno
import resource

import pytest
import torch

from emloc.artefacts.read_errors import unreadable
from emloc.artefacts.write_errors import others_writing
from emloc.config import StageConfig
from emloc.errors import CheckpointError, MemoryLimitError, OutputError, UnexpectedError
from emloc.stages.boundary import boundary
from emloc.stages.stage import stage


class Options(StageConfig):
    """No options."""


def failing(problem):
    @stage(Options)
    def attempt(config):
        raise problem

    return attempt


@pytest.mark.parametrize(
    ("problem", "kind", "code", "says"),
    [
        (KeyError("x"), UnexpectedError, 1, "attempt met an unexpected error: KeyError: 'x'"),
        (ZeroDivisionError(), UnexpectedError, 1, "ZeroDivisionError, at .*test_boundary.py:.*--debug"),
        (MemoryError(), MemoryLimitError, 10, "attempt: there was not enough memory"),
        (RuntimeError("std::bad_alloc"), MemoryLimitError, 10, "not enough memory"),
        (OSError(errno.ENOSPC, "x", "/tmp"), OutputError, 7, "The disk is full while writing /tmp"),
        (OSError(errno.EIO, "x", "/tmp/y"), OutputError, 7, "The disk failed while writing /tmp/y"),
        (OSError(errno.EFBIG, "x"), OutputError, 7, "limit on the size of files"),
        (CheckpointError("as it is"), CheckpointError, 4, "^as it is$"),
    ],
)  # fmt: skip
def test_every_exception_is_one_sentence_with_its_cause(problem, kind, code, says):
    with pytest.raises(kind, match=says) as caught:
        failing(problem)()
    assert caught.value.exit_code == code
    assert problem in (caught.value, caught.value.__cause__)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_interruptions_pass(kind):
    with pytest.raises(kind):
        failing(kind())()


def test_a_panic_of_a_library_in_rust_is_an_error_like_any():
    class PanicException(BaseException):
        pass

    with pytest.raises(UnexpectedError, match="PanicException: called unwrap"), boundary("x"):
        raise PanicException("called unwrap")


def test_a_stream_of_torch_on_a_full_disk_is_recognised(tmp_path, monkeypatch):
    """/dev/full refuses every write as a full disk does; torch says only that its stream failed."""
    monkeypatch.setattr("emloc.machine.disk_errors.ROOM", 1 << 60)
    with pytest.raises(OutputError, match="The disk is full"), others_writing(tmp_path):
        torch.save({"a": torch.ones(1000, 1000)}, "/dev/full")


def test_a_stream_of_torch_that_may_not_be_so_long(tmp_path):
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    try:
        with pytest.raises(OutputError, match="ulimit -f"), others_writing(tmp_path):
            torch.save({"a": torch.ones(1000, 1000)}, tmp_path / "a.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def test_a_damaged_archive_that_torch_reads_is_no_full_disk(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:2000])
    with pytest.raises(RuntimeError, match="StreamReader"), others_writing(tmp_path):
        torch.load(tmp_path / "a.pt", weights_only=True)


def test_memory_and_the_system_are_not_called_corrupt():
    hint = "it is incomplete or corrupt"
    for problem in (
        MemoryError(),
        OSError(errno.ENOMEM, "x"),
        RuntimeError("out of memory (os error 12)"),
    ):
        error = unreadable("shard", "cannot be read", hint, problem)
        assert isinstance(error, MemoryLimitError)
        assert "corrupt" not in str(error)
    open_files = unreadable("shard", "cannot be read", hint, OSError(errno.EMFILE, "x"))
    assert str(open_files) == "shard cannot be read: too many files are open (raise ulimit -n)."
    assert "corrupt" in str(unreadable("shard", "cannot be read", hint, ValueError("header")))
