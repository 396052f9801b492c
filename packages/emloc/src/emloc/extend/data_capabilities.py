"""Capabilities that a family may have of its data, found and used as those of `emloc.extend.capabilities`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from emloc.config import CalibrationOptions, DataOptions
from emloc.extend.family import ModelFamily


@runtime_checkable
class CountsTokens(Protocol):
    """A family whose calibration samples may be asked for in tokens."""

    def calibration_tokens(self, options: CalibrationOptions) -> int | None:
        """Tokens that samples are drawn until there are; None where their number is asked for."""
        ...


def calibration_tokens_of(family: ModelFamily, options: CalibrationOptions) -> int | None:
    """Tokens that samples are drawn until there are; None, as by default, for so many samples."""
    return family.calibration_tokens(options) if isinstance(family, CountsTokens) else None


@runtime_checkable
class ReadsWhole(Protocol):
    """A family whose options say what of a calibration sample is learnt, and where it is cut."""

    def read_whole(
        self, options: CalibrationOptions, length: int, elsewhere: bool
    ) -> Mapping[str, Any]:
        """Options under which all of a sample is learnt, as a model is trained further.

        Args:
            length: tokens that samples are cut at, where there are tokens.
            elsewhere: whether the samples are of another data set than `options` name.
        """
        ...


def read_whole_by(
    family: ModelFamily, options: CalibrationOptions, length: int, elsewhere: bool
) -> Mapping[str, Any]:
    """Options under which all of a sample is learnt; by default none, since there is no other way."""
    return family.read_whole(options, length, elsewhere) if isinstance(family, ReadsWhole) else {}


@runtime_checkable
class NamesDataFiles(Protocol):
    """A family whose data sets name further files, such as pictures, which then belong to the data."""

    def data_files(self, options: DataOptions, dataset: str, split: str) -> Iterable[Path]:
        """The files that the rows of a local data set name, in any order; they need not exist.

        Args:
            options: of the stage that will read them.
            dataset: of one name, a file or folder.
            split: which part of it.
        """
        ...


def data_files_of(
    family: ModelFamily, options: DataOptions, dataset: str, split: str
) -> Iterable[Path]:
    """The files that the rows of a local data set name; by default none."""
    return family.data_files(options, dataset, split) if isinstance(family, NamesDataFiles) else ()
