"""Laws of modules that training learns whole beside a LoRA: they are carried to the end, bit for bit."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import emloc
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import ConfigError
from emloc.extend.capabilities import vocabulary_of
from emloc.extend.losses import loss_sum
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject


class WholeModuleLaws(SubjectFixture):
    """Promises of `train` and of evaluations about `lora_modules_to_save`."""

    def test_a_module_that_is_trained_whole_is_carried_to_the_end(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        """Correction keeps it, merging puts it in place, and an evaluation of the adapter has it too."""
        family, base = subject.family, subject.checkpoint
        module = _outside_of_blocks(subject)
        if module is None:
            return
        saved = {"lora_modules_to_save": [module]}
        try:
            adapter = subject.train(tmp_path / "adapter", **saved)
        except ConfigError:  # of a family that trains nothing whole
            return
        trained = Adapter.open(str(adapter))
        stored = family.stored(subject.skeleton, f"{module}.weight", base)
        assert stored is not None
        learnt = trained.read(trained.saved[f"{module}.weight"])
        before = stored.read(base.read)
        assert learnt.shape == before.shape
        assert not torch.equal(learnt.to(before.dtype), before), f"{module} learnt nothing"
        corrected = subject.correct(tmp_path / "corrected", adapter=str(adapter))
        kept = Adapter.open(str(corrected))
        assert torch.equal(kept.read(kept.saved[f"{module}.weight"]), learnt)
        merged = emloc.merge(adapter=str(corrected), output_dir=tmp_path / "merged")
        whole = Checkpoint.open(str(merged))
        assert torch.equal(stored.read(whole.read), learnt.to(before.dtype))
        adapted = subject.evaluate(adapter=str(corrected))["loss"]
        assert subject.evaluate(model_name_or_path=str(merged))["loss"] == pytest.approx(
            adapted, rel=1e-4
        )
        if importlib.util.find_spec("peft") is None:
            return
        peft: Any = importlib.import_module("peft")
        model = peft.PeftModel.from_pretrained(family.load(base, "float32", "cpu"), str(corrected))
        together = family.load(whole, "float32", "cpu")
        with torch.no_grad():
            ours, theirs = (
                loss_sum(family, one, subject.batches[0]) for one in (together, model.eval())
            )
        assert theirs.total == pytest.approx(ours.total, rel=1e-4)


def _outside_of_blocks(subject: Subject) -> str | None:
    """The last module with a weight that is in no block and in no table of the vocabulary."""
    model = subject.skeleton
    blocks = tuple(f"{block}." for block in subject.family.blocks(model))
    tables = {name for entry in vocabulary_of(subject.family, model) for name in entry}
    names = [
        name
        for name, part in model.named_modules()
        if isinstance(getattr(part, "weight", None), nn.Parameter)
        and not name.startswith(blocks)
        and name not in tables
    ]
    return names[-1] if names else None
