"""The planner's arithmetic against the libraries that a step runs in: transformers, PEFT, bitsandbytes."""

import pytest
import torch
from bitsandbytes import functional
from optimizer_reference import OPTIMISED, held_after_a_step
from peft import LoraConfig, get_peft_model
from tape_reference import ROWS, WIDTH, counted, sized
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.optimization import Adafactor

from emloc.integrations.peft.fused_lora import fuse_lora
from emloc.layers.low_rank_linear import LowRankLinear
from emloc.planning.operations import Layer
from emloc.planning.qlora import quantised_bytes
from emloc.planning.training import optimizer_bytes


def test_rms_norm_as_transformers_has_it():
    norm = LlamaRMSNorm(WIDTH).requires_grad_(False)
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 2)):
        norm.to(dtype)
        real = counted(norm, (ROWS, WIDTH), dtype=dtype)
        planned = sized(lambda f, x: f.rms_norm(x, WIDTH), (ROWS, WIDTH), itemsize=itemsize)
        assert planned[0] == real[0]
        assert planned[1:] == pytest.approx(real[1:], abs=ROWS * 4)


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_linear_layers_with_factors_and_lora(rank, dtype, itemsize):
    """Against PEFT's layer and ours, also where a LoRA stays in float32 beside half precision."""
    d_out, lora_rank = 33, 3
    made = nn.Linear(WIDTH, d_out, dtype=dtype)
    if rank:
        made = LowRankLinear(WIDTH, d_out, rank, True, dtype)
    model = nn.Sequential(made.requires_grad_(False))
    model = get_peft_model(model, LoraConfig(r=lora_rank, target_modules=["0"]))
    fuse_lora(model)
    real = counted(model, (ROWS, WIDTH), dtype=dtype)
    layer = Layer(WIDTH, d_out, rank, "x", 1, lora_rank)
    planned = sized(lambda f, x: f.linear(x, layer), (ROWS, WIDTH), itemsize=itemsize)
    assert planned[:2] == real[:2]
    gradients = 4 * lora_rank * (WIDTH + d_out)  # counted elsewhere
    assert planned[2] <= real[2] <= planned[2] + gradients


def test_adafactor_holds_what_is_planned():
    parameters = [torch.nn.Parameter(torch.zeros(*shape)) for shape in OPTIMISED]
    adafactor = Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)
    held = held_after_a_step(adafactor, parameters)
    planned = optimizer_bytes("adafactor", OPTIMISED, 4)
    assert planned == pytest.approx(held, abs=4 * 8 * len(OPTIMISED))


def test_nf4_against_bitsandbytes():
    weight = torch.randn(96, 160)
    packed, state = functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True, blocksize=64
    )
    held = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    count = sum(value.numel() * value.element_size() for value in held)
    assert quantised_bytes(weight.numel()) == pytest.approx(count, abs=8)
