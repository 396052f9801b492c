"""Laws of dtypes: what is asked for is what the layers have, and a loss is precise whatever they have."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.layers.emulated_layer import EmulatedLayer
from emloc.options.compress import LOW_RANK_FORMAT
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject

DTYPES = (torch.bfloat16, torch.float64)


class DtypeLaws(SubjectFixture):
    """Promises of `skeleton`, `load` and `loss` about dtypes."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_model_has_the_dtype_that_is_asked_for(
        self, subject: Subject, dtype: torch.dtype
    ) -> None:
        """Layers that can be compressed do; some libraries keep other modules in float32."""
        family, name = subject.family, str(dtype).removeprefix("torch.")
        model = family.load(subject.checkpoint, name, "cpu")
        for made in (model, family.skeleton(subject.checkpoint, dtype)):
            layers = (layer for group in family.layer_groups(made) for layer in group)
            assert _dtypes(made, layers) == {dtype}
        with torch.no_grad():
            total, _ = family.loss(model, subject.batches[0])
        assert total.dtype in (torch.float32, torch.float64)
        assert bool(torch.isfinite(total))

    def test_an_emulator_is_loaded_as_it_is_stored(self, subject: Subject, tmp_path: Path) -> None:
        """Dense layers of one in bfloat16 stay in it with `auto`; it is in eval mode, its loss precise."""
        family, model = subject.family, subject.skeleton
        layers = [name for group in family.layer_groups(model) for name in group]
        group = list(family.layer_groups(model))[-1]
        others = [f"^{re.escape(name)}$" for name in layers if name not in group]
        few = {"num_calibration_samples": 4, "format": LOW_RANK_FORMAT, "keep_ratio": 0.5}
        folder = subject.compress(tmp_path / "half", dtype="bfloat16", exclude=others, **few)
        emulator = family.load(Checkpoint.open(str(folder)), "auto", "cpu")
        dense = [n for n in layers if not isinstance(emulator.get_submodule(n), EmulatedLayer)]
        assert len(dense) == len(others)
        assert _dtypes(emulator, dense) <= {torch.bfloat16}
        assert not any(module.training for module in emulator.modules())
        with torch.no_grad():
            total, _ = family.loss(emulator, subject.batches[0])
        assert total.dtype in (torch.float32, torch.float64)


def _dtypes(model: nn.Module, layers: Iterable[str]) -> set[torch.dtype]:
    return {model.get_parameter(f"{layer}.weight").dtype for layer in layers}
