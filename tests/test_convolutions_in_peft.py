"""The low-rank convolution in the hands of PEFT, which takes it for a dense one."""

import pytest
import torch
from convolution_reference import dense_twin, filled
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn


class Convolutions(nn.Module):
    def __init__(self, low_rank):
        super().__init__()
        first = filled(nn.Conv2d(3, 5, 3, 2, 1, dtype=torch.float64), seed=1)
        second = filled(nn.Conv2d(5, 4, 1, bias=False, dtype=torch.float64), 2, seed=2)
        self.first = first if low_rank else dense_twin(first)
        self.second = second if low_rank else dense_twin(second)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("dora", [False, True])
def test_stock_peft_trains_it_as_a_dense_convolution(dora):
    """The same adapter on a dense twin: same keys and shapes, outputs and gradients."""
    config = {"r": 2, "target_modules": ["first", "second"], "init_lora_weights": False}
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    seen = []
    for low_rank in (True, False):
        base = Convolutions(low_rank)
        torch.manual_seed(1)  # the twin drew values before it got its own
        model = get_peft_model(base, LoraConfig(**config, use_dora=dora)).double()
        output = model(x)
        output.sin().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert all(name.count("lora_") for name in gradients)
        state = get_peft_model_state_dict(model)
        seen.append((output.detach(), [(k, v.shape) for k, v in state.items()], gradients))
        lora = model.get_submodule("base_model.model.first")
        assert type(lora.lora_A["default"]) is type(lora.lora_B["default"]) is nn.Conv2d
    ours, theirs = seen
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1] == theirs[1]
    torch.testing.assert_close(ours[2], theirs[2])


def test_peft_cannot_merge_into_it():
    for safe in (False, True):
        model = get_peft_model(Convolutions(True), LoraConfig(r=2, target_modules=["first"]))
        with pytest.raises(RuntimeError, match="cannot be written"):
            model.merge_and_unload(safe_merge=safe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_training_in_other_dtypes(dtype):
    model = get_peft_model(
        Convolutions(True).to(dtype), LoraConfig(r=2, target_modules=["first", "second"])
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x, goal = torch.randn(2, 3, 6, 7, dtype=dtype), torch.randn(2, 4, 3, 4)
    losses = []
    for _ in range(4):
        loss = (model(x).float() - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
