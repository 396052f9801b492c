"""The contract of every family, for each architecture: the whole method on a tiny random model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from emloc.testing import FamilyContract
from emloc_encoder.example import write_example


class EncoderContract(FamilyContract):
    """The contract for one architecture; not collected itself."""

    family = "encoder"
    plugin = "emloc_encoder_hooks"
    model_type: ClassVar[str]

    def example(self, folder: Path, seed: int) -> Mapping[str, Any]:
        """A tiny model of the architecture, and its data."""
        return write_example(folder, seed, self.model_type)


class TestBert(EncoderContract):
    model_type = "bert"


class TestRoberta(EncoderContract):
    """RoBERTa, whose head of two layers is trained whole."""

    model_type = "roberta"
    stage_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        stage: {"lora_modules_to_save": ["classifier"]} for stage in ("train", "plan")
    }


class TestDistilbert(EncoderContract):
    model_type = "distilbert"


class TestElectra(EncoderContract):
    model_type = "electra"


class TestDeberta(EncoderContract):
    model_type = "deberta-v2"


class TestModernbert(EncoderContract):
    model_type = "modernbert"


class TestAlbert(EncoderContract):
    model_type = "albert"
