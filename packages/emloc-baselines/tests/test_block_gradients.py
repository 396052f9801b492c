"""Gradients block by block, where blocks do not run as they are listed, or again, or give no number."""

from contextlib import contextmanager

import pytest
import torch
from pruning_reference import gradients, load
from safetensors.torch import load_file, save_file

from emloc.config import CompressConfig
from emloc.errors import ConfigError, NumericalError
from emloc.extend.opening import open_model
from emloc.extend.plugin_options import with_plugin_options
from emloc.streaming.block_gradients import backward_by_block
from emloc.streaming.stream import UnitStream
from emloc_llm.example import write_model


def stream_of(base, data):
    checkpoint, family = open_model(str(base))
    options = with_plugin_options(CompressConfig)(
        model_name_or_path=str(base), output_dir="x", dataset=str(data), max_length=96,
        num_calibration_samples=6, calibration_batch_size=3,
    )  # fmt: skip
    return UnitStream(family, checkpoint), family.calibration_batches(checkpoint, options)


def found_by(stream, batches):
    found = {}

    @contextmanager
    def visit(block, module):
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        yield
        found.update({f"{block}.{n}": p.grad for n, p in module.named_parameters()})

    backward_by_block(stream, batches, visit)
    return found


def test_blocks_go_back_in_the_order_in_which_they_ran(tmp_path, tiny):
    """Which need not be that of their names, as where a model lists the tower of images behind the text."""
    base = write_model(tmp_path / "base")
    stream, batches = stream_of(base, tiny.data)
    stream.blocks.reverse()
    found, expected = found_by(stream, batches), gradients(load(base), batches)
    assert len(found) == sum(".layers." in name for name in expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3)
        assert gradient.any(), name


def run_in(model, order):
    """Have a model go through its blocks in this order, by their numbers."""

    class InOrder(torch.nn.ModuleList):
        def __getitem__(self, index):
            blocks = list(self._modules.values())
            return [blocks[n] for n in order] if isinstance(index, slice) else blocks[index]

    model.model.layers.__class__ = InOrder


def test_a_block_that_runs_again_has_the_gradients_of_all_its_runs(tmp_path, tiny):
    base = write_model(tmp_path / "base")
    stream, batches = stream_of(base, tiny.data)
    whole = load(base)
    for model in (stream.model, whole):
        run_in(model, [0, 1, 0, 2, 0])
    expected, sums = gradients(whole, batches), {}

    @contextmanager
    def visit(block, module):
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        yield
        for name, parameter in module.named_parameters():
            total = sums.setdefault(f"{block}.{name}", torch.zeros_like(parameter))
            total += parameter.grad

    backward_by_block(stream, batches, visit, in_parts=True)
    assert len(sums) == sum(".layers." in name for name in expected)
    for name, gradient in sums.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match=r"Block model\.layers\.0 runs again after others"):
        found_by(stream, batches)


def test_runs_that_follow_each_other_share_a_visit(tmp_path, tiny):
    """ALBERT's one block runs at all depths; when it is left, its gradients are complete."""
    base = write_model(tmp_path / "base")
    stream, batches = stream_of(base, tiny.data)
    whole = load(base)
    for model in (stream.model, whole):
        run_in(model, [0, 0, 0, 1])
    expected, ours = gradients(whole, batches), found_by(stream, batches)
    reached = {name: gradient for name, gradient in ours.items() if gradient is not None}
    assert {name.split(".")[2] for name in reached} == {"0", "1"}
    for name, gradient in reached.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3)


def test_a_loss_that_is_no_number_is_an_error(tmp_path, tiny):
    base = write_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][3] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="The calibration samples: the loss is nan"):
        found_by(*stream_of(base, tiny.data))
