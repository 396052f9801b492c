"""Laws of a model's weights: tied ones are one, missing ones are refused, LoRAs are where PEFT puts them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import EmlocError
from emloc.extend.capabilities import native_of
from emloc.extend.losses import loss_sum
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject


class WeightLaws(SubjectFixture):
    """Promises of `skeleton`, `stored` and `load` about parameters, and of the adapters that go on them."""

    def test_tied_weights_are_one_parameter(self, subject: Subject) -> None:
        """The skeleton ties what the loaded model ties, so a tensor is counted, fitted and merged once."""
        family, checkpoint = subject.family, subject.checkpoint
        skeleton = family.skeleton(checkpoint, torch.float32)
        loaded = family.load(checkpoint, "float32", "cpu")
        assert _ties(skeleton) == _ties(loaded)
        plainly: dict[str, str] = {}
        for name, _ in skeleton.named_parameters():
            stored = family.stored(skeleton, name, checkpoint)
            assert stored is not None, name
            if stored.plain_name is not None:
                other = plainly.setdefault(stored.plain_name, name)
                assert other == name, f"{other} and {name} are one tensor and not tied"

    def test_a_checkpoint_that_is_not_whole_is_refused(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        """Without one of its tensors, and with a file cut short: nothing is drawn in their place."""
        model = subject.family.skeleton(subject.checkpoint, torch.float32)
        layer = subject.family.layer_groups(model)[-1][-1]
        stored = subject.family.stored(model, f"{layer}.weight", subject.checkpoint)
        assert stored is not None
        source = Path(subject.example["model_name_or_path"])

        def without(file: Path) -> None:
            tensors = load_file(file)
            if stored.names[0] in tensors:
                del tensors[stored.names[0]]
                file.unlink()  # it may be a link
                save_file(tensors, file, metadata={"format": "pt"})

        def cut(file: Path) -> None:
            content = file.read_bytes()
            file.unlink()
            file.write_bytes(content[: len(content) // 2])

        changes: list[Callable[[Path], None]] = [without, cut]
        for number, change in enumerate(changes):
            folder = Path(shutil.copytree(source, tmp_path / str(number)))
            for file in sorted(folder.rglob("*.safetensors")):
                change(file)
            with pytest.raises(EmlocError):
                checkpoint = native_of(subject.family, Checkpoint.open(str(folder)))
                subject.family.load(checkpoint, "float32", "cpu")

    def test_stock_peft_puts_the_adapter_where_merging_does(self, subject: Subject) -> None:
        """`PeftModel.from_pretrained`, by the adapter's task type, has the loss of the merged model."""
        peft = pytest.importorskip("peft")
        family, folder = subject.family, subject.corrected
        written = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        base = family.load(subject.checkpoint, "float32", "cpu")
        model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
        kinds = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING if written.get("task_type") else {}
        assert type(model) is kinds.get(written.get("task_type"), peft.PeftModel)
        merged = family.load(Checkpoint.open(str(subject.merged)), "float32", "cpu")
        with torch.no_grad():
            batch = subject.batches[0]
            adapted, whole = (loss_sum(family, one, batch) for one in (model, merged))
        assert adapted.terms == whole.terms
        assert adapted.total == pytest.approx(whole.total, rel=1e-4)


def _ties(model: nn.Module) -> set[frozenset[str]]:
    """Names of parameters that are one, where there are several."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}
