"""What a candidate of the correction adds to a convolution is what stock PEFT's LoRA adds to it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from emloc.correction import limits
from emloc.linalg.convolution import as_matrix


class Model(nn.Module):
    def __init__(self, proj):
        super().__init__()
        self.proj = proj

    def forward(self, x):
        return self.proj(x)


CASES = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9)),
    "1d, one of a length as its channels": (lambda: nn.Conv1d(6, 8, 1), (2, 6, 6)),
    "2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 7)),
    "2d, not zeros around": (
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
        (2, 6, 5, 7),
    ),
    "2d, with holes": (lambda: nn.Conv2d(6, 8, 3, padding="same", dilation=2), (2, 6, 9, 9)),
    "3d": (lambda: nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4), bias=False), (5, 3, 2, 4, 4)),
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_it_is_pefts(monkeypatch, name, dora):
    make, shape = CASES[name]
    torch.manual_seed(0)
    base, x = Model(make()).double(), torch.randn(shape).double()
    options = LoraConfig(
        r=4, lora_alpha=8, target_modules=["proj"], use_dora=dora, init_lora_weights=False
    )
    peft = get_peft_model(copy.deepcopy(base), options, autocast_adapter_dtype=False).eval()
    layer = peft.base_model.model.proj
    down, up = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
    gains = None
    if dora:
        magnitude = layer.lora_magnitude_vector["default"].weight.data.mul_(1.3).reshape(-1)
        summed = as_matrix(base.proj.weight.detach()) + 2 * as_matrix(up) @ as_matrix(down)
        gains = [magnitude / summed.norm(dim=1)]
    monkeypatch.setattr(limits, "current_call", lambda: SimpleNamespace(context=(0,)))
    lora = limits.CandidateLora(down, [as_matrix(up)], 2.0, gains)
    base.proj.register_forward_hook(limits._adding(lora))
    with torch.no_grad():
        torch.testing.assert_close(base(x), peft(x), rtol=1e-10, atol=1e-10)
