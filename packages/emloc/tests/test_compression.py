"""The pass over models of unusual shape: what is folded is what layers read, or the model is refused."""

import contextlib
import shutil
from contextlib import contextmanager

import pytest
import torch
from odd_models import (
    REAL,
    WIDTH,
    Again,
    AlwaysGated,
    Backwards,
    Block,
    EachTwice,
    Family,
    Gated,
    Idle,
    InsideTwice,
    LastTwice,
    Looping,
    Plain,
    Prompted,
    SharedLayer,
    TokensFirst,
    real_batches,
    written,
)
from torch import nn

from emloc.artefacts.file_digest import file_sha256
from emloc.compression import one_pass
from emloc.compression.emulator_folder import EmulatorFolder
from emloc.compression.fitting import compress_blocks
from emloc.compression.groups import CompressionPlan, Group
from emloc.compression.sensitivity import BlockProbe
from emloc.errors import ConfigError
from emloc.formats.layer_format import GroupShape
from emloc.formats.low_rank import low_rank
from emloc.streaming.call import Call
from emloc.streaming.lockstep import lockstep
from emloc.streaming.stream import UnitStream


@pytest.fixture
def compressed(tmp_path):
    """Runs the pass over a family's model; returns the blocks' reports and the model."""

    def run(kind, mask=None, span=None, shared=False, go_on=False, **how):
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
        work = tmp_path / "work"
        if not go_on:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        run.folder = folder = EmulatorFolder(
            stream, CompressionPlan(tuple(groups), {}), "auto", work
        )
        compress_blocks(stream, folder, real_batches(), **how)
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


@pytest.mark.parametrize("kind", [Again, Looping, LastTwice, EachTwice, Backwards])
def test_a_block_is_fitted_to_all_of_its_runs(compressed, kind, tmp_path):
    """Tokens, and the error that the fitted weight makes on them, are those of plain forwards."""
    reports, model = compressed(kind)
    folder = compressed.folder
    for block, report in reports.items():
        fitted = folder.emulated(block)
        for layer, entry in report["layers"].items():
            rows, weight = read_by(model, layer), model.get_parameter(f"{layer}.weight").double()
            lost = (rows @ (weight - fitted[f"{layer}.weight"].double()).T).square().sum()
            assert entry["tokens"] == len(rows) == counted(model, layer)
            expected = float((lost / (rows @ weight.T).square().sum()).sqrt().detach())
            assert entry["relative_error"] == pytest.approx(expected, rel=1e-3)


def read_by(model, layer):
    """Real rows that a layer reads in plain forwards, in float64."""
    rows = []
    for batch in real_batches():
        handle = model.get_submodule(layer).register_forward_pre_hook(
            lambda _, inputs, mask=batch["mask"]: rows.append(inputs[0][mask].detach().double())
        )
        model(batch["x"])
        handle.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("kind", [Plain, Again, Looping, LastTwice, EachTwice])
def test_a_pass_that_was_killed_ends_with_the_same_bytes(compressed, kind, monkeypatch):
    """Wherever it was killed: before a block was written, after it, or before the runs were counted."""
    compressed(kind)
    whole = [file_sha256(compressed.folder.work / name) for name in compressed.folder.shards[:-1]]
    points = [(EmulatorFolder, "write_block"), (one_pass, "write_runs"), (one_pass, "known_runs")]
    for owner, name in points:
        real = getattr(owner, name)
        for kept in range(3):
            for before in (True, False):
                calls = []

                def killed(*given, real=real, calls=calls, kept=kept, before=before):
                    calls.append(given)
                    if len(calls) > kept and before:
                        raise KeyboardInterrupt
                    made = real(*given)
                    if len(calls) > kept:
                        raise KeyboardInterrupt
                    return made

                with monkeypatch.context() as patch:
                    patch.setattr(owner, name, killed)
                    with contextlib.suppress(KeyboardInterrupt):
                        compressed(kind)
                compressed(kind, go_on=True)
                again = [
                    file_sha256(compressed.folder.work / file)
                    for file in compressed.folder.shards[:-1]
                ]
                assert again == whole, (name, kept, before)


@pytest.mark.parametrize("kind", [Again, Looping, LastTwice, EachTwice])
@pytest.mark.parametrize("kept", [0, 1, 2, None])
def test_propagation_refuses_it_however_often_it_is_tried(compressed, kind, kept, monkeypatch):
    """What a refused or a killed call has written is never taken for complete."""
    calls, real = [], EmulatorFolder.write_block

    def killed(*given):
        if len(calls) == kept:
            raise KeyboardInterrupt
        calls.append(given)
        real(*given)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt, ConfigError):
        patch.setattr(EmulatorFolder, "write_block", killed)
        compressed(kind, propagate_errors=True)
    for _ in range(3):
        with pytest.raises(ConfigError, match="propagate_errors: block .* runs more than once"):
            compressed(kind, go_on=True, propagate_errors=True)


def test_sizes_of_a_block_that_runs_again_follow_its_last_run(compressed):
    """What is allocated by how much the block's output minds, of the first micro-batch."""
    reports, _ = compressed(Again, span=(1, 6))
    for entry in reports["blocks.0"]["layers"].values():
        assert entry["sensitivity"] > 0


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
