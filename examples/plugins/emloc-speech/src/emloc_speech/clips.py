"""Rows that name a clip of audio, and the samples of one."""

import wave
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emloc.plugin import DataError, load_table


class Clip(NamedTuple):
    """A .wav file and what is said in it."""

    audio: Path
    text: str


def read_clips(dataset: str, split: str) -> Iterator[Clip]:
    """Clips of a local data set; a relative path begins at the data file.

    Raises:
        DataError: the data set cannot be read, or a row names no clip or has no text.
    """
    place = Path(dataset)
    folder = place if place.is_dir() else place.parent
    for number, row in enumerate(load_table(dataset, split, False), 1):
        audio, text = row.get("audio"), row.get("text")
        if not isinstance(audio, str) or not isinstance(text, str):
            raise DataError(
                f"Row {number} of {dataset} must have a path of a .wav file as `audio`, and a `text`."
            )
        yield Clip(folder / audio, text)


def read_samples(path: Path, rate: int, most: int) -> np.ndarray:
    """The samples of a clip, from -1 to 1.

    Args:
        rate: samples per second that the model hears.
        most: samples that its window has.

    Raises:
        DataError: the file is no .wav, is of another form, or lasts longer.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, given, count = file.getparams()[:4]
            content = file.readframes(count)
    except (OSError, EOFError, wave.Error) as problem:
        raise DataError(f"{path} cannot be read as a .wav file: {problem}") from problem
    if (channels, width, given) != (1, 2, rate):
        raise DataError(
            f"{path} has {channels} channels of {8 * width} bits at {given} Hz; convert it to one channel "
            f"of 16 bits at {rate} Hz, which is what the model hears."
        )
    if len(content) != 2 * count:
        raise DataError(f"{path} is cut short: its header promises {count} samples.")
    if count > most:
        raise DataError(
            f"{path} lasts {count / rate:.1f} s; cut it into clips of {most / rate:.1f} s."
        )
    return np.frombuffer(content, "<i2").astype(np.float32) / 32768
