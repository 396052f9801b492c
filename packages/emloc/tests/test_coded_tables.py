"""Tables of rows in few bits: rounding against brute force, lookups and products against dense ones."""

import pytest
import torch
from torch import nn

from emloc.formats.vocabulary import VocabularyTable
from emloc.layers import coded_table
from emloc.layers.coded_table import CodedHead, TiedHead, coded_embedding
from emloc.linalg import row_rounding
from emloc.linalg.grid import Grid
from emloc.linalg.row_rounding import rounded_parts


def table(rows=41, columns=100, dtype=torch.float32):
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    made *= torch.logspace(-3, 1, rows)[:, None]
    made[5] = 0
    made[7, 3:] = 0
    return made.to(dtype)


def encoded(values, bits, size=64):
    layout = VocabularyTable(("a",), *values.shape, bits, "a.", size).matrix
    parts = [layout.encoded(grid, codes) for grid, codes in rounded_parts(values, bits, size)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, layout


def levels(grid: Grid):
    """All that each group can hold, in float64: rows × groups × levels."""
    codes = torch.arange(grid.levels + 1, dtype=torch.float64)
    return (codes - grid.zeros.double()[..., None]) * grid.scales.double()[..., None]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "size"), [(100, 64), (48, 64), (72, 16)])
def test_every_number_becomes_the_nearest_level(bits, dtype, columns, size):
    values = table(41, columns, dtype)
    stored, layout = encoded(values, bits, size)
    decoded = layout.decoded(stored.__getitem__).dense(torch.float32).double()
    for grid, _ in rounded_parts(values, bits, size):
        nearest = levels(grid).repeat_interleave(size, 1)[:, :columns]
        exact = values.double()[..., None]
        best = (nearest - exact).abs().amin(-1)
        scale = grid.scales.repeat_interleave(size, 1)[:, :columns].double()
        off = (decoded - values.double()).abs()
        assert bool((off <= best + 1e-5 * scale).all())
    assert bool((decoded[5] == 0).all())
    assert bool((decoded[7, 3:] == 0).all())
    error = (decoded - values.double()).norm(dim=1) / values.double().norm(dim=1).clamp(min=1e-9)
    # A scale has an 8-bit share of the largest of 256, so the smallest rows are rounded less well.
    assert error[30:].max() < {4: 0.2, 8: 0.05}[bits]


def test_parts_are_the_whole(monkeypatch):
    values = table(1200, 100)
    whole, _ = encoded(values, 4)
    monkeypatch.setattr(row_rounding, "PART", 20_000)
    seen = [len(codes) for _, codes in rounded_parts(values, 4, 64)]
    assert max(seen) * 100 <= 20_000
    assert len(seen) > 5
    parts, _ = encoded(values, 4)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_whole(dtype):
    stored, layout = encoded(table(300, 100), 4, 32)
    weight = layout.decoded(stored.__getitem__)
    index = torch.tensor([299, 0, 7, 7, 130])
    assert torch.equal(weight.rows(index, dtype), weight.dense(dtype)[index])


def modules(bits=8, bias=False):
    values = table(300, 48)
    stored, layout = encoded(values, bits)
    dense, head = nn.Embedding(300, 48, padding_idx=3), nn.Linear(48, 300, bias)
    embedding = coded_embedding(dense, dict(layout.stored()), layout.decoded, "")
    embedding.load_state_dict(stored)
    own = CodedHead(
        48, 300, bias, dict(layout.stored()), layout.decoded, "", torch.float32,
        torch.device("cpu"),
    )  # fmt: skip
    own.load_state_dict(stored | ({"bias": head.bias.detach()} if bias else {}))
    weight = layout.decoded(stored.__getitem__).dense(torch.float32)
    dense.weight.data = head.weight.data = weight
    return embedding, own, TiedHead(head, embedding), dense, head


def test_lookups_decode_what_they_look_up(monkeypatch):
    embedding, _, _, dense, _ = modules()
    asked = []
    from emloc.layers.coded_weight import CodedWeight

    decode = CodedWeight.rows
    monkeypatch.setattr(
        CodedWeight, "rows", lambda self, index, dtype: asked.append(len(index)) or decode(self, index, dtype)
    )  # fmt: skip
    monkeypatch.setattr(CodedWeight, "dense", lambda *_: pytest.fail("the whole table was made"))
    ids = torch.tensor([[3, 299, 0], [1, 1, 70]])
    assert torch.equal(embedding(ids), dense(ids))
    assert asked == [6]
    assert embedding.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert embedding.weight.dtype == torch.bfloat16
    assert embedding.codes.dtype == torch.uint8


def test_tiles_of_the_weight_decode_a_tile(monkeypatch):
    from emloc.layers.coded_weight import CodedWeight

    _, head, _, _, dense = modules()
    monkeypatch.setattr(CodedWeight, "dense", lambda *_: pytest.fail("the whole table was made"))
    weight = head.weight
    assert torch.equal(weight[100:164].to(torch.float32) + 0, dense.weight[100:164])
    assert torch.equal(weight[50:250][10:20] + 0, dense.weight[60:70])
    assert torch.equal(weight[-7:] + 0, dense.weight[-7:])
    assert weight[9:4].shape == (0, 48)


@pytest.mark.parametrize("bias", [False, True])
def test_heads_multiply_and_go_back(bias, monkeypatch):
    monkeypatch.setattr(coded_table, "ROWS", 64)
    _, own, tied, _, dense = modules(bias=bias)
    x = torch.randn(2, 5, 48, requires_grad=True)
    expected = dense(x)
    [gradient] = torch.autograd.grad(expected.square().sum(), x)
    for head in (own, tied):
        y = head(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        made = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(made[0], gradient, rtol=1e-4, atol=1e-2)
        with torch.autocast("cpu", torch.bfloat16):
            assert head(x).dtype == torch.bfloat16
    assert not tied.state_dict().keys() - {"bias"}
    with pytest.raises(RuntimeError, match="belongs to an emulator"):
        own.weight.mul_(2)
