"""Second moments of gradients at layers' outputs, over all runs of their blocks."""

import contextlib

import pytest
import torch
from odd_models import Again, EachTwice, Family, LastTwice, Looping, Plain, real_batches, written
from safetensors.torch import load_file

from emloc.artefacts.shard_writer import ShardWriter
from emloc.compression.groups import CompressionPlan, Group
from emloc.compression.output_gradients import OutputGradients
from emloc.formats.layer_format import GroupShape
from emloc.formats.low_rank import low_rank
from emloc.streaming.stream import UnitStream

KINDS = [Plain, Again, Looping, LastTwice, EachTwice]


def planned(stream):
    groups = []
    for block in stream.blocks:
        for name in ("up", "down"):
            d_out, d_in = stream.layer_shape(f"{block}.{name}")
            groups.append(Group(GroupShape((f"{block}.{name}",), (d_out,), d_in), low_rank(2)))
    return CompressionPlan(tuple(groups), {})


def by_autograd(model, layers):
    """Sums over the whole model in float64, with every output of a layer in the graph."""
    sums = dict.fromkeys(layers, 0.0)

    def watching(layer):
        def add(gradient):
            rows = gradient.reshape(-1, gradient.shape[-1])
            sums[layer] = sums[layer] + rows.T @ rows

        return lambda _, __, output: output.register_hook(add) and None

    for layer in layers:
        model.get_submodule(layer).register_forward_hook(watching(layer))
    sum(model(batch["x"].double()).sum() for batch in real_batches()).backward()
    return sums


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("files", [None, 1, 2, 3])
def test_they_are_those_of_autograd(kind, files, tmp_path, monkeypatch):
    """In one go, and where a pass was killed after so many files: what it left is not taken for all."""
    torch.manual_seed(0)
    model = kind().eval()
    stream = UnitStream(Family(kind), written(model, tmp_path / "base"))
    plan, work = planned(stream), tmp_path / "work"
    work.mkdir()
    if files is not None:
        checkpoint = stream.checkpoint
        calls, real = [], ShardWriter.__exit__

        def killed(*given):
            calls.append(real(*given))
            if len(calls) == files:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "__exit__", killed)
            with contextlib.suppress(KeyboardInterrupt):
                OutputGradients.gather(stream, plan, real_batches(), work)
        stream = UnitStream(Family(kind), checkpoint)
    gathered = OutputGradients.gather(stream, plan, real_batches(), work)
    layers = [group.owner for group in plan.groups]
    expected = by_autograd(model.double(), layers)
    for block, path in gathered.paths.items():
        for layer, moments in load_file(path).items():
            assert layer.startswith(block)
            torch.testing.assert_close(moments.double(), expected[layer], rtol=1e-3, atol=1e-4)
    assert {layer for path in gathered.paths.values() for layer in load_file(path)} == set(layers)
    mean = gathered.of(plan.groups[0]).mean
    assert mean == pytest.approx(float(expected[layers[0]].diagonal().mean()), rel=1e-3)
