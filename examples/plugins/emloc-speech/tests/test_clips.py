"""Clips that cannot be heard are refused in one sentence."""

import json
import wave
from pathlib import Path

import pytest

from emloc.plugin import DataError
from emloc_speech.clips import read_clips, read_samples


def write(path: Path, rate: int = 16000, channels: int = 1, samples: int = 100) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(b"\0\x40" * samples * channels)
    return path


def test_samples_are_from_minus_one_to_one(tmp_path: Path) -> None:
    heard = read_samples(write(tmp_path / "a.wav"), 16000, 200)
    assert heard.shape == (100,)
    assert set(heard.tolist()) == {0.5}


def test_what_the_model_does_not_hear_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 channels of 16 bits at 8000 Hz; convert it to one"):
        read_samples(write(tmp_path / "a.wav", rate=8000), 16000, 200)
    with pytest.raises(DataError, match="2 channels of 16 bits at 16000 Hz"):
        read_samples(write(tmp_path / "b.wav", channels=2), 16000, 200)
    with pytest.raises(DataError, match=r"lasts 2\.0 s; cut it into clips of 1\.0 s"):
        read_samples(write(tmp_path / "c.wav", samples=32000), 16000, 16000)
    whole = write(tmp_path / "d.wav")
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match="is cut short: its header promises 100 samples"):
        read_samples(whole, 16000, 200)
    with pytest.raises(DataError, match="cannot be read as a .wav file"):
        read_samples(tmp_path / "none.wav", 16000, 200)


def test_rows_name_clips_beside_the_data_file(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    rows = [{"audio": "a.wav", "text": "one"}, {"audio": "/elsewhere/b.wav", "text": "two"}]
    data.write_text("\n".join(map(json.dumps, rows)))
    named = [clip.audio for clip in read_clips(str(data), "train")]
    assert named == [tmp_path / "a.wav", Path("/elsewhere/b.wav")]
    data.write_text(json.dumps({"audio": 3, "text": "one"}))
    with pytest.raises(DataError, match="Row 1 of .* must have a path of a .wav file as `audio`"):
        list(read_clips(str(data), "train"))
