"""The low-rank layer, and what the ecosystem does with it without knowing us."""

import copy

import pytest
import torch
from llm_reference import load, logits
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from emloc.layers.low_rank_linear import LowRankLinear


def group(sizes=(7, 5), d_in=6, rank=3):
    shared, layers = None, []
    for d_out in sizes:
        layer = LowRankLinear(d_in, d_out, rank, True, torch.float64, shared=shared,
                              group_size=len(sizes))  # fmt: skip
        shared = layer.shared
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        layers.append(layer)
    return layers


def dense(layer, x):
    return torch.nn.functional.linear(x, torch.Tensor(layer.weight), layer.bias)


def test_values_and_gradients_are_those_of_the_dense_layer():
    layers = group()
    for _ in range(2):
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        ours = torch.cat([layer(x) for layer in layers], -1)
        theirs = torch.cat([dense(layer, x) for layer in layers], -1)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours.sin().sum(), x)[0],
            torch.autograd.grad(theirs.sin().sum(), x)[0],
        )


def test_the_shared_projection_is_never_stale():
    first, second = group()
    x, y = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    first(x)
    torch.testing.assert_close(second(y), dense(second, y))  # another input
    first(x)
    x.mul_(2)
    torch.testing.assert_close(second(x), dense(second, x))  # changed in place
    z = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        first(z)
    assert second(z).requires_grad  # a product without a graph does not serve a forward with one
    first(z)
    assert first.shared._product is None  # nothing outlives the group
    second(z)
    kept = first.shared._product
    second(z)
    assert first.shared._product is not kept  # the same layer again is another forward


def test_a_copy_is_independent():
    first, second = copy.deepcopy(torch.nn.ModuleList(group()))
    assert second.shared.owner is first


def test_writing_to_the_weight_is_refused():
    layer, _ = group()
    assert layer.weight.shape == (7, 6)
    with pytest.raises(RuntimeError, match="cannot be written"):
        layer.weight.data += 1


def test_stock_peft_trains_it(tiny, batch):
    """Somebody's own trainer: no call of ours but the import."""
    model = get_peft_model(
        load(tiny.emulator), LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    adapted = {n for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(adapted) == 21  # 7 layers of 3 blocks, the head left out
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3
    with pytest.raises(RuntimeError, match="cannot be written"):
        model.merge_and_unload()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_match_a_dense_model_of_the_same_weights(tiny, batch, checkpointing):
    emulator = load(tiny.emulator)
    reference = load(tiny.base)
    with torch.no_grad():
        for name, module in emulator.named_modules():
            if isinstance(module, LowRankLinear):
                reference.get_submodule(name).weight.copy_(torch.Tensor(module.weight))
    gradients = []
    for model in (emulator, reference):
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)


def test_save_pretrained_writes_it_back(tiny, tmp_path, batch):
    model = load(tiny.emulator)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))
    held = sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values())
    assert held == sum(p.numel() for p in model.parameters())  # the shared factor is stored once


def test_generation(tiny, batch):
    model = load(tiny.emulator)
    ids = batch["input_ids"][:1]
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    step = ids
    for _ in range(4):
        step = torch.cat([step, logits(model, {"input_ids": step})[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, step)
