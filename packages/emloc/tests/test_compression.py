"""The pass over models of unusual shape: what is folded is what layers read, or the model is refused."""

import json
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.compression.emulator_folder import EmulatorFolder
from emloc.compression.fitting import compress_blocks
from emloc.compression.groups import CompressionPlan, Group
from emloc.compression.sensitivity import BlockProbe
from emloc.errors import ConfigError
from emloc.extend.family import StoredParameter
from emloc.formats.layer_format import GroupShape
from emloc.formats.low_rank import low_rank
from emloc.streaming.call import Call
from emloc.streaming.lockstep import lockstep
from emloc.streaming.stream import UnitStream

WIDTH = 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 10)
        self.down = nn.Linear(10, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Plain(nn.Module):
    """Two blocks, one after the other."""

    count = 2

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(self.count))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 300)

    def body(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


class Again(Plain):
    """One block that is called three times in a row, as ALBERT's."""

    count = 1

    def body(self, x):
        return self.blocks[0](self.blocks[0](self.blocks[0](x)))


class Looping(Plain):
    """All blocks in turn, a norm, and all of them once more, as a universal transformer."""

    def body(self, x):
        for _ in range(2):
            x = self.norm(super().body(x))
        return x


class LastTwice(Plain):
    def body(self, x):
        return self.blocks[1](super().body(x))


class Backwards(Plain):
    def body(self, x):
        return self.blocks[0](self.blocks[1](x))


class Idle(Plain):
    """A block that no sample needs, as a tower without images."""

    def body(self, x):
        return self.blocks[0](x)


class InsideTwice(Plain):
    """A layer that reads two things inside its block."""

    def body(self, x):
        block = self.blocks[1]
        block.forward = lambda x: block.down(block.up(block.down(block.up(x)).relu()).relu())
        return super().body(x)


class SharedLayer(Plain):
    def __init__(self):
        super().__init__()
        self.blocks[1].up = self.blocks[0].up


class Gated(Plain):
    """Two layers that read the same, except in the last micro-batch."""

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.gate = nn.Linear(WIDTH, 10)
            block.forward = partial(self.run, block)

    @staticmethod
    def run(block, x):
        other = x if x.shape[1] == 5 else x + 1
        return block.down(block.up(x) * block.gate(other))


class AlwaysGated(Gated):
    @staticmethod
    def run(block, x):
        return block.down(block.up(x) * block.gate(x.clone()))


class TokensFirst(Plain):
    def body(self, x):
        return super().body(x.transpose(0, 1)).transpose(0, 1)


class Prompted(Plain):
    """Learnt tokens in front of the text's."""

    def body(self, x):
        return super().body(torch.cat([torch.ones(x.shape[0], 2, WIDTH), x], 1))[:, 2:]


class Family:
    """What the pass asks of a family, for the models above."""

    def __init__(self, kind, mask=None):
        self.kind, self.mask = kind, mask

    def skeleton(self, checkpoint, dtype):
        with torch.device("meta"):
            return self.kind().eval()

    def stored(self, model, parameter, checkpoint):
        return StoredParameter((parameter,)) if parameter in checkpoint.tensors else None

    def blocks(self, model):
        return [f"blocks.{index}" for index in range(self.kind.count)]

    def token_mask(self, batch, layer=None):
        return batch["mask"] if self.mask is None else self.mask(batch, layer)

    def loss(self, model, batch):
        return model(batch["x"]).sum(), 1


def real_batches():
    draw = torch.Generator().manual_seed(1)
    batches = []
    for lengths in ((5, 3), (4, 4), (1, 4)):
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        batches.append({"x": torch.randn(*mask.shape, WIDTH, generator=draw), "mask": mask})
    return batches


REAL = 5 + 3 + 4 + 4 + 1 + 4


def written(model, folder):
    """A model as a checkpoint."""
    folder.mkdir(exist_ok=True)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    return Checkpoint.open(folder)


@pytest.fixture
def compressed(tmp_path):
    """Runs the pass over a family's model; returns the blocks' reports and the model."""

    def run(kind, mask=None, span=None, shared=False):
        torch.manual_seed(0)
        model = kind().eval()
        stream = UnitStream(Family(kind, mask), written(model, tmp_path / "base"))
        groups = []
        for block in stream.blocks:
            names = [
                n for n in ("up", "gate") if f"{block}.{n}.weight" in stream.checkpoint.tensors
            ]
            parts = [names] if shared else [[name] for name in names]
            for part in (*parts, ["down"]):
                d_out, d_in = (WIDTH, 10) if part == ["down"] else (10, WIDTH)
                layers = tuple(f"{block}.{name}" for name in part)
                if layers:
                    shape = GroupShape(layers, (d_out,) * len(layers), d_in)
                    wide = low_rank(span[1]) if span else None
                    groups.append(Group(shape, low_rank(3), wide))
        (tmp_path / "work").mkdir()
        folder = EmulatorFolder(
            stream, CompressionPlan(tuple(groups), {}), "auto", tmp_path / "work"
        )
        compress_blocks(stream, folder, real_batches())
        return {block: folder.read_report(block) for block in stream.blocks}, model

    return run


def counted(model, layer):
    """Real tokens that a layer reads in plain forwards, call by call."""
    seen = []
    handle = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, x: seen.append(int(batch["mask"].sum()))
    )
    for batch in real_batches():
        model(batch["x"])
    handle.remove()
    return sum(seen)


@pytest.mark.parametrize("kind", [Plain, Backwards, InsideTwice])
def test_every_real_token_is_folded_as_often_as_it_is_read(compressed, kind):
    reports, model = compressed(kind)
    for block, report in reports.items():
        assert set(report["layers"]) == {f"{block}.up", f"{block}.down"}
        for layer, entry in report["layers"].items():
            assert entry["tokens"] == counted(model, layer)
    twice = reports["blocks.1"]["layers"]["blocks.1.up"]["tokens"]
    assert twice == (2 * REAL if kind is InsideTwice else REAL)


@pytest.mark.parametrize("kind", [Again, Looping, LastTwice])
def test_a_block_that_runs_again_is_refused(compressed, kind):
    with pytest.raises(ConfigError, match=r"Block blocks\.\d runs more than once"):
        compressed(kind)


def test_a_block_that_is_not_reached_stays_dense(compressed):
    reports, _ = compressed(Idle)
    assert set(reports["blocks.0"]["layers"]) == {"blocks.0.up", "blocks.0.down"}
    assert reports["blocks.1"]["layers"] == {}
    assert reports["blocks.1"]["unreached"] == ["blocks.1.up", "blocks.1.down"]


def test_a_head_is_not_run_to_look_for_blocks(compressed, monkeypatch):
    ran = []
    monkeypatch.setattr(Plain, "body", lambda self, x: ran.append(1) or
                        self.blocks[1](self.blocks[0](x)))  # fmt: skip
    heads = []
    forward = nn.Linear.forward

    def watched(self, x):
        heads.append(self.out_features)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", watched)
    compressed(Plain)
    assert ran
    assert 300 not in heads


def test_layers_that_share_a_weight_are_refused(compressed):
    with pytest.raises(ConfigError, match=r"Layers blocks\.0\.up and blocks\.1\.up share one"):
        compressed(SharedLayer)


def test_layers_share_factors_only_where_they_read_the_same(compressed):
    reports, _ = compressed(AlwaysGated, shared=True)
    assert reports["blocks.0"]["layers"]["blocks.0.up"]["layers"][1] == "blocks.0.gate"


def test_layers_that_read_other_things_now_and_then_are_refused(compressed):
    with pytest.raises(
        ConfigError, match=r"blocks\.0\.up and blocks\.0\.gate .* share_factors=false"
    ):
        compressed(Gated, shared=True)


@pytest.mark.parametrize("kind", [TokensFirst, Prompted])
def test_a_mask_that_does_not_fit_is_refused(compressed, kind):
    with pytest.raises(ConfigError, match=r"Layer blocks\.0\.up has .* calibration_batch_size=1"):
        compressed(kind)


def test_a_family_may_say_which_rows_are_real(compressed):
    """Learnt prompts are; and what the mask says of the layer is what counts."""

    def mask(batch, layer):
        front = torch.ones(batch["mask"].shape[0], 2, dtype=torch.bool)
        return torch.cat([front, batch["mask"]], 1)

    reports, _ = compressed(Prompted, mask)
    assert reports["blocks.1"]["layers"]["blocks.1.down"]["tokens"] == REAL + 3 * 2 * 2


class Pooling(Plain):
    """Its first block reads five tokens or fewer and writes two, whose mask is another."""

    def __init__(self):
        super().__init__()
        first = self.blocks[0]

        def pooled(x):
            return Block.forward(first, x).mean(1, keepdim=True).repeat(1, 2, 1)

        first.forward = pooled


def pooled_mask(batch, name):
    if name == "blocks.0" or (name or "").startswith("blocks.1"):
        return torch.tensor([[True, False]]).repeat(batch["mask"].shape[0], 1)
    return batch["mask"]


def test_what_a_block_writes_has_a_mask_of_its_own(compressed, tmp_path):
    reports, model = compressed(Pooling, pooled_mask, span=(1, 4))
    entry = reports["blocks.0"]["layers"]["blocks.0.up"]
    assert entry["tokens"] == REAL
    assert reports["blocks.1"]["layers"]["blocks.1.up"]["tokens"] == 3 * 2
    assert entry["sensitivity"] > 0
    stream = UnitStream(Family(Pooling), written(model, tmp_path / "base"))
    with pytest.raises(ConfigError, match=r"Block blocks\.0 has 2 × 2 rows"):
        probe_of(stream)


def probe_of(stream):
    """The sensitivity of the first block's first layer."""
    batch, probe = real_batches()[0], BlockProbe(stream)
    weight = torch.ones(10, 3) @ torch.ones(3, WIDTH)
    found = []

    @contextmanager
    def visit(unit):
        with stream.filled(unit), probe.of(unit):
            yield
            if unit == "blocks.0":
                found.append(probe.sensitivity(["blocks.0.up"], [weight]))

    calls = [Call(lambda: stream.family.loss(stream.model, batch), context=batch)]
    with probe.watching(["blocks.0"]):
        lockstep(stream.model, stream.units, calls, visit)
    return found[0]


@torch.no_grad()
def test_sensitivity_is_that_of_real_tokens(tmp_path):
    torch.manual_seed(0)
    model = Plain().eval()
    found = probe_of(UnitStream(Family(Plain), written(model, tmp_path / "base")))
    batch, block = real_batches()[0], model.blocks[0]
    before = block(batch["x"])
    block.up.weight = nn.Parameter(torch.ones(10, 3) @ torch.ones(3, WIDTH))
    change = (block(batch["x"]) - before).square().sum(-1) / before.square().sum(-1)
    assert found == pytest.approx(float(change[batch["mask"]].mean()), rel=1e-5)
