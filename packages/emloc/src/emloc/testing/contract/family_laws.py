"""Laws of the family itself: its skeleton, blocks and groups, its data, its loss, and its whole models."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.config import DemoConfig, build
from emloc.errors import PluginError
from emloc.extend.capabilities import (
    ExportsAdapters,
    HasDemo,
    HasOtherLayouts,
    KeepsLayersDense,
    MasksPadding,
    adapter_formats_of,
    kept_dense_of,
    native_of,
    run_demo,
    token_count,
    token_mask_of,
)
from emloc.extend.family import Batch, ModelFamily
from emloc.extend.losses import LossSum, loss_sum
from emloc.extend.opening import family_of
from emloc.layers.emulated_layer import EmulatedLayer
from emloc.streaming.call import Call
from emloc.streaming.lockstep import lockstep
from emloc.streaming.stream import UnitStream
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject


class FamilyLaws(SubjectFixture):
    """Promises of `ModelFamily`, each compared with a plain computation."""

    def test_is_a_family(self, subject: Subject) -> None:
        """All that the protocol requires is there, and adapters are written as PEFT writes them."""
        assert isinstance(subject.family, ModelFamily)
        assert "peft" in adapter_formats_of(subject.family)

    def test_recognises_its_own_checkpoint_from_the_config(self, subject: Subject) -> None:
        """This family is the one that claims it."""
        assert family_of(subject.checkpoint).name == subject.family.name

    def test_skeleton_has_no_weights_and_real_buffers(self, subject: Subject) -> None:
        """Every parameter is on the meta device, and in the checkpoint in its shape."""
        checkpoint = subject.checkpoint
        model = subject.family.skeleton(checkpoint, torch.float32)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert all(buffer.device.type == "cpu" for buffer in model.buffers())
        assert not model.training
        for name, parameter in model.named_parameters():
            stored = subject.family.stored(model, name, checkpoint)
            assert stored is not None, name
            assert stored.read(checkpoint.read).shape == parameter.shape

    def test_blocks_and_layers(self, subject: Subject) -> None:
        """Blocks lie apart, and every layer in one of them; layers of a group have inputs of one size."""
        model = subject.family.skeleton(subject.checkpoint, torch.float32)
        blocks = list(subject.family.blocks(model))
        assert len(blocks) == len(set(blocks)) > 0
        assert not any(a != b and a.startswith(f"{b}.") for a in blocks for b in blocks)
        for block in blocks:
            kind = type(model.get_submodule(block))
            assert not issubclass(kind, (nn.ModuleList, nn.ModuleDict)), (
                f"{block} is a list of modules, which no forward calls"
            )
        groups = subject.family.layer_groups(model)
        layers = [name for group in groups for name in group]
        assert len(layers) == len(set(layers)) > 0
        for group in groups:
            shapes = {model.get_parameter(f"{name}.weight").shape[1:] for name in group}
            assert len(shapes) == 1
            owners = [b for b in blocks if f"{group[0]}.".startswith(f"{b}.")]
            assert owners
            assert all(f"{name}.".startswith(f"{owners[0]}.") for name in group)

    def test_a_block_is_not_a_stack_of_blocks(self, subject: Subject) -> None:
        """Memory is that of one block, so that none may hold alike modules that run one after another."""
        stream = UnitStream(subject.family, subject.checkpoint)
        left: dict[int, str] = {}
        follows: dict[str, str] = {}
        kept: list[Any] = []  # so that no address is used twice

        def entering(name: str) -> Callable[..., None]:
            def enter(_: nn.Module, inputs: Any) -> None:
                if inputs and id(inputs[0]) in left:
                    follows[name] = left[id(inputs[0])]

            return enter

        def leaving(name: str) -> Callable[..., None]:
            def leave(_: nn.Module, __: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) else output
                kept.append(first)
                left[id(first)] = name

            return leave

        alike = {
            name: children
            for block in stream.blocks
            for name, children in _alike_children(stream.model.get_submodule(block), block)
        }
        for name in (name for children in alike.values() for name in children):
            module = stream.model.get_submodule(name)
            module.register_forward_pre_hook(entering(name))
            module.register_forward_hook(leaving(name))
        _streamed(subject, stream, subject.batches[:1])
        for parent, children in alike.items():
            stacked = [name for name in children if follows.get(name) in children]
            assert len(stacked) < 2, f"{parent} holds the blocks {', '.join(children)}"

    def test_abilities_that_it_lacks_have_cores_defaults(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        """Nothing but the groups is compressible, one layout, PEFT's format alone, no demonstration."""
        family, checkpoint = subject.family, subject.checkpoint
        model = family.skeleton(checkpoint, torch.float32)
        kept = kept_dense_of(family, model)
        layers = {name for group in family.layer_groups(model) for name in group}
        assert layers.isdisjoint(kept)
        assert all(isinstance(model.get_submodule(name), nn.Module) for name in kept)
        if not isinstance(family, KeepsLayersDense):
            assert kept == {}
        if not isinstance(family, HasOtherLayouts):
            assert native_of(family, checkpoint) is checkpoint
        if not isinstance(family, ExportsAdapters):
            assert adapter_formats_of(family) == ("peft",)
        if not isinstance(family, HasDemo):
            with pytest.raises(PluginError, match="has no demo"):
                run_demo(family, build(DemoConfig, {"output_dir": tmp_path}, "demo"))

    def test_layers_of_a_group_read_one_tensor(self, subject: Subject) -> None:
        """Layers of a group do in every forward, since they are fitted to the same moments."""
        inputs = _inputs_read(subject)
        for group in subject.family.layer_groups(subject.skeleton):
            assert len({inputs.get(name) for name in group}) == 1, group

    def test_layers_of_a_module_that_read_one_tensor_are_a_group(self, subject: Subject) -> None:
        """Warns of those that are not: sharing a factor is an economy, and no promise."""
        apart = apart_though_shared(subject)
        if apart:
            warnings.warn(f"These layers read the same and are no group: {apart}", stacklevel=2)

    def test_streamed_forward_is_the_plain_forward(self, subject: Subject) -> None:
        """Bit for bit, with all weights loaded at once instead of one unit at a time."""
        family, checkpoint = subject.family, subject.checkpoint
        streamed = _streamed(subject, UnitStream(family, checkpoint), subject.batches)
        whole = family.skeleton(checkpoint, torch.float32)
        for name, _ in list(whole.named_parameters(remove_duplicate=False)):
            owner, _, leaf = name.rpartition(".")
            stored = family.stored(whole, name, checkpoint)
            assert stored is not None
            value = nn.Parameter(stored.read(checkpoint.read).float(), requires_grad=False)
            setattr(whole.get_submodule(owner), leaf, value)
        with torch.no_grad():
            plain = [loss_sum(family, whole, batch) for batch in subject.batches]
        assert streamed == plain
        assert all(result.terms > 0 for result in plain)

    def test_calibration_is_by_seed(self, subject: Subject) -> None:
        """The same seed draws the same samples, another one others, and as many as asked for."""
        again = subject.calibration()
        assert all(torch.equal(a[k], b[k]) for a, b in zip(subject.batches, again) for k in a)
        few = {"num_calibration_samples": 4}
        some = [subject.calibration(**few, seed=seed) for seed in (0, 1)]
        first = [next(iter(part[0].values())) for part in some]
        assert first[0].shape != first[1].shape or not torch.equal(*first)
        assert len(subject.calibration(**few, calibration_batch_size=1)) == 4

    def test_real_tokens_are_told_from_padding(self, subject: Subject) -> None:
        """Masks tell them apart where there are any; else all are real."""
        family = subject.family
        for batch in subject.batches:
            mask = token_mask_of(family, batch)
            assert mask is None or (isinstance(family, MasksPadding) and mask.dtype == torch.bool)
            real = next(iter(batch.values())).numel() if mask is None else int(mask.sum())
            assert token_count(family, batch) == real > 0

    def test_a_loss_is_a_sum(self, subject: Subject) -> None:
        """The same samples twice have twice the loss, and twice the terms."""
        model = subject.family.load(subject.checkpoint, "float32", "cpu")
        once = subject.batches[0]
        twice = {name: torch.cat([tensor, tensor]) for name, tensor in once.items()}
        with torch.no_grad():
            single, double = (loss_sum(subject.family, model, batch) for batch in (once, twice))
        assert double.terms == 2 * single.terms
        torch.testing.assert_close(double.total, 2 * single.total, rtol=1e-4, atol=1e-4)

    def test_a_whole_model_has_the_loss_of_the_streamed_one(self, subject: Subject) -> None:
        """`load` gives the base in eval mode, and `loss` a sum with its graph in float32 or better."""
        family, batches = subject.family, subject.batches[:1]
        [streamed] = _streamed(subject, UnitStream(family, subject.checkpoint), batches)
        model = family.load(subject.checkpoint, "float32", "cpu")
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        model.requires_grad_(True)
        total, terms = family.loss(model, batches[0])
        assert total.ndim == 0
        assert total.dtype in (torch.float32, torch.float64)
        assert total.requires_grad
        assert terms == streamed.terms
        torch.testing.assert_close(float(total.detach()), streamed.total, rtol=1e-4, atol=1e-4)
        total.backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())

    def test_an_emulator_is_loaded_with_its_layers(self, subject: Subject) -> None:
        """Every layer of the manifest in its form, and a loss that is not the base's."""
        folder, family = subject.stages["emulator"], subject.family
        emulator = family.load(Checkpoint.open(str(folder)), "float32", "cpu")
        entries = Manifest.read(folder).layers.values()
        for name in (name for entry in entries for name in entry["layers"]):
            assert isinstance(emulator.get_submodule(name), EmulatedLayer), name
        base = family.load(subject.checkpoint, "float32", "cpu")
        with torch.no_grad():
            batch = subject.batches[0]
            ours, theirs = (loss_sum(family, model, batch) for model in (emulator, base))
        assert torch.isfinite(torch.tensor(ours.total))
        if any(entry["relative_error"] > 0 for entry in entries):
            assert ours.total != theirs.total


def apart_though_shared(subject: Subject) -> list[list[str]]:
    """Layers of one module that read one tensor in every forward, and lie in several groups."""
    inputs = _inputs_read(subject)
    readers: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for group in subject.family.layer_groups(subject.skeleton):
        if group[0] in inputs:
            readers.setdefault((group[0].rpartition(".")[0], inputs[group[0]]), []).append(group[0])
    return [names for names in readers.values() if len(names) > 1]


def _inputs_read(subject: Subject) -> dict[str, tuple[int, ...]]:
    """Addresses of the tensors that each layer of a group read in one forward."""
    stream = UnitStream(subject.family, subject.checkpoint)
    read: dict[str, list[Tensor]] = {}

    def reading(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, inputs: read.setdefault(name, []).append(inputs[0])

    for name in (n for group in subject.family.layer_groups(stream.model) for n in group):
        stream.model.get_submodule(name).register_forward_pre_hook(reading(name))
    _streamed(subject, stream, subject.batches[:1])
    # Tensors that are kept have addresses of their own.
    return {name: tuple(x.data_ptr() for x in tensors) for name, tensors in read.items()}


def _alike_children(module: nn.Module, name: str) -> Iterator[tuple[str, list[str]]]:
    """Three or more children of one module that hold layers and have the same parameters, by its name."""
    for path, parent in module.named_modules():
        kinds: dict[Any, list[str]] = {}
        for child, part in parent.named_children():
            if next(part.children(), None) is not None:
                shapes = tuple((n, p.shape) for n, p in part.named_parameters())
                whole = ".".join(filter(None, (name, path, child)))
                kinds.setdefault((type(part), shapes), []).append(whole)
        for (_, shapes), names in kinds.items():
            if len(names) >= 3 and shapes:
                yield ".".join(filter(None, (name, path))), names


def _streamed(subject: Subject, stream: UnitStream, batches: Sequence[Batch]) -> list[LossSum]:
    calls = [
        Call(lambda b=batch: loss_sum(subject.family, stream.model, b))  # pyright: ignore[reportUnknownLambdaType]
        for batch in batches
    ]
    return lockstep(stream.model, stream.units, calls, stream.filled)
