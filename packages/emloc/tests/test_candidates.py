"""A candidate's LoRA as hooks add it, on the device of the layer."""

import pytest
import torch
from torch import nn

from emloc.correction.limits import CandidateLora, _adding
from emloc.streaming.call import Call
from emloc.streaming.lockstep import lockstep
from emloc.testing import pretend_device


@pytest.mark.parametrize("bias", [False, True])
def test_dora_scales_what_is_not_bias(bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 6, bias=bias), torch.randn(3, 4)
    down, up, gain = torch.randn(2, 4), torch.randn(6, 2), torch.rand(6)
    scaled = gain[:, None] * (layer.weight + 0.5 * up @ down)
    expected = nn.functional.linear(x, scaled, layer.bias).detach()
    with pretend_device():
        lora = CandidateLora(down.cuda(), [up.cuda()], 0.5, [gain.cuda()])
        model = nn.Sequential(layer).to("cuda")
        model[0].register_forward_hook(_adding(lora))
        calls = [Call(lambda: model(x.to("cuda")).cpu(), context=(0, 0))]
        [found] = lockstep(model, ["0"], calls, lambda _: torch.no_grad())
    torch.testing.assert_close(found, expected)
