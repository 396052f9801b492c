"""A law of streamed training: block by block, it is training in memory."""

from pathlib import Path

import torch

from emloc.artefacts.adapter import Adapter
from emloc.extend.capabilities import StreamsTraining
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject


class StreamingLaws(SubjectFixture):
    """A promise of `StreamsTraining`."""

    def test_streamed_training_is_training_in_memory(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        """The adapter of the base, without dropout, is the same, all that is trained whole included."""
        if not isinstance(subject.family, StreamsTraining):
            return
        base = {"model_name_or_path": subject.example["model_name_or_path"], "lora_dropout": 0.0}
        whole, streamed = (
            Adapter.open(str(subject.train(tmp_path / str(stream), stream=stream, **base)))
            for stream in (False, True)
        )
        keys = {key for layer in whole.layers for key in (layer.down_key, layer.up_key)}
        keys |= set(whole.saved.values())
        assert keys
        for key in keys:
            torch.testing.assert_close(
                streamed.read(key), whole.read(key), rtol=1e-3, atol=1e-5, msg=key
            )
