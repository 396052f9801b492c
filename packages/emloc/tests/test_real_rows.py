"""Padding is taken out where it is known to be, and what does not fit is an error."""

import pytest
import torch
from torch import nn

from emloc.errors import ConfigError
from emloc.streaming.real_rows import may_be_expert, real_rows

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()


def values(*shape):
    return torch.randn(*shape, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(3, 5), (15,), (3, 1, 5), (1, 3, 5), (3, 5, 1)])
def test_rows_are_those_of_real_tokens(shape):
    x = values(3, 5)
    expected = torch.stack([x[i, j] for i in range(3) for j in range(5) if MASK[i, j]])
    assert torch.equal(real_rows(x.reshape(*shape, 7), MASK, "Layer a"), expected)


def test_patches_of_images_merge_rows_and_columns():
    mask = torch.ones(2, 4, 6, dtype=torch.bool)
    mask[1, :, 4:] = False
    x = values(2, 4, 6)
    assert torch.equal(real_rows(x.reshape(2, 24, 7), mask, "Layer a"), x[mask])


def test_without_a_mask_all_rows_count():
    assert real_rows(values(2, 3, 4), None, "Layer a").shape == (24, 7)


@pytest.mark.parametrize(
    "shape",
    [(5, 3), (3, 43), (3, 15), (3, 2, 5), (14,), (16,), (3, 6), (3,), (3, 1), (45,), (1, 5)],
    ids=str,
)
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ConfigError, match=r"Layer a has .* calibration_batch_size=1"):
        real_rows(values(*shape), MASK, "Layer a")


def test_a_state_before_the_first_token_is_nothing():
    assert real_rows(torch.zeros(3, 1, 7), MASK, "Layer a").shape == (0, 7)


def test_experts_lie_side_by_side():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(3, 3)
            self.mlp = nn.Module()
            self.mlp.shared = nn.Linear(3, 3)
            self.mlp.experts = nn.ModuleList(nn.Sequential(nn.Linear(3, 5)) for _ in range(2))
            self.by_name = nn.ModuleDict({"one": nn.Linear(3, 4)})

    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    found = {n: may_be_expert(model, "layers.0", f"layers.0.{n}") for n in (
        "q", "mlp.shared", "mlp.experts.1.0", "by_name.one")}  # fmt: skip
    assert not may_be_expert(model, "layers.0.q", "layers.0.q")
    assert found == {
        "q": False, "mlp.shared": False, "mlp.experts.1.0": True, "by_name.one": True,
    }  # fmt: skip
