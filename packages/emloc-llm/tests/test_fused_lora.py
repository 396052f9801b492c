"""LoRA on low-rank layers: PEFT's results, without PEFT's passes between the products."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_reference import load
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import emloc
from emloc.integrations.peft.fused_lora import FusedLora, fuse_lora
from emloc.integrations.transformers import lora_training
from emloc.layers.low_rank_linear import LowRankLinear

NAMES = ("q", "k", "v")


class Attention(torch.nn.Module):
    """Three layers of one input, one with a bias, and one after them."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        shared = None
        for name, d_out in zip(NAMES, (7, 5, 4)):
            layer = LowRankLinear(6, d_out, 3, name == "k", dtype, shared=shared, group_size=3)
            shared = layer.shared
            setattr(self, name, layer)
        self.out = LowRankLinear(16, 9, 2, True, dtype)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter)

    def forward(self, x):
        return self.out(torch.cat([getattr(self, name)(x).sin() for name in NAMES], dim=-1))


def pair(dtype=torch.float64, adapters=1, **options):
    """The same adapted model twice: as PEFT makes it, and fused."""
    options = {"r": 2, "lora_alpha": 5, "target_modules": [*NAMES, "out"], **options}
    stock = get_peft_model(Attention(dtype), LoraConfig(**options), autocast_adapter_dtype=False)
    for number in range(1, adapters):
        stock.add_adapter(f"other{number}", LoraConfig(**options), autocast_adapter_dtype=False)
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    fused = copy.deepcopy(stock)
    assert fuse_lora(fused) == sum("lora_A" in n for n, _ in stock.named_modules()) // (
        1 + adapters
    )
    return stock, fused


def step(model, x):
    """The output and all gradients of one step."""
    x = x.clone().requires_grad_()
    y = model(x)
    model.zero_grad()
    y.sin().sum().backward()
    return y.detach(), x.grad, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same(stock, fused, x, **tolerance):
    ours, theirs = step(fused, x), step(stock, x)
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    torch.testing.assert_close(ours[1], theirs[1], **tolerance)
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(ours[2][name], gradient, **tolerance, msg=name)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from([*NAMES, "out"]), min_size=1, unique=True),
    st.sampled_from([(6,), (3, 6), (2, 3, 6)]),
    st.dictionaries(st.sampled_from([*NAMES, "out"]), st.integers(1, 5)),
    st.booleans(),
)
def test_values_and_gradients_are_those_of_peft(targets, shape, ranks, rslora):
    stock, fused = pair(target_modules=targets, rank_pattern=ranks, use_rslora=rslora)
    x = torch.randn(*shape, dtype=torch.float64)
    for _ in range(2):
        assert_same(stock, fused, x)
    # Not only along the rows that memory happens to hold together.
    wide = torch.randn(*shape[:-1], 12, dtype=torch.float64)[..., ::2]
    assert_same(stock, fused, wide)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_dropout": 0.5}, {"adapters": 2}, {"lora_bias": True}]
)
def test_what_is_not_plain_is_left_to_peft(options):
    stock, fused = pair(**options)
    if "adapters" in options:
        for model in (stock, fused):
            model.base_model.set_adapter(["default", "other1"])
    x = torch.randn(3, 6, dtype=torch.float64)
    for model in (stock, fused):
        model.eval()
    assert_same(stock, fused, x)
    stock.train(), fused.train()
    torch.manual_seed(3)
    expected = stock(x)
    torch.manual_seed(3)
    torch.testing.assert_close(fused(x), expected)


def test_adapters_are_switched_and_turned_off():
    stock, fused = pair(adapters=2)
    x = torch.randn(3, 6, dtype=torch.float64)
    outputs = []
    for name in ("default", "other1", "default"):
        stock.set_adapter(name), fused.set_adapter(name)
        assert_same(stock, fused, x)
        outputs.append(fused(x))
    assert not torch.allclose(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    with stock.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(fused(x), stock(x))
    assert_same(stock.unload(), fused.unload(), x)


def test_a_frozen_layer_that_is_trained_after_all_gets_its_gradient():
    stock, fused = pair()
    for model in (stock, fused):
        model.base_model.model.q.base_layer.right.requires_grad_()
    assert_same(stock, fused, torch.randn(3, 6, dtype=torch.float64))
    assert fused.base_model.model.q.base_layer.right.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    """Under autocast products are bfloat16 in both; else a float32 LoRA keeps float32 products."""
    torch.manual_seed(1)
    stock, fused = pair(dtype)
    if dtype == torch.bfloat16:
        for model in (stock, fused):
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.float()
        assert fused.base_model.model.q.plain_down(torch.ones(1, 6)) is None
        assert_same(stock, fused, torch.randn(3, 6, dtype=dtype))
    x = torch.randn(3, 6)
    exact, _ = step(copy.deepcopy(stock).double(), x.double())[0::2]
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.base_model.model.q.plain_down(x) is not None
        ours, theirs = step(fused, x), step(stock, x)
    assert ours[0].dtype == theirs[0].dtype == torch.bfloat16
    assert (ours[0] - exact).norm() < 1.5 * (theirs[0] - exact).norm()
    for name, gradient in ours[2].items():
        assert gradient.dtype == torch.float32
        cosine = torch.cosine_similarity(gradient.flatten(), theirs[2][name].flatten(), dim=0)
        assert cosine > 0.9


def test_a_product_without_a_graph_does_not_serve_training():
    _, fused = pair()
    attention = fused.base_model.model
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        attention.q(x)
    assert attention.k(x).requires_grad
    attention.q(x)
    x.mul_(2)
    torch.testing.assert_close(attention.k(x), attention.k(x.clone()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_real_model_trains_alike(tiny, batch, checkpointing):
    models = []
    for fuse in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(load(tiny.emulator), LoraConfig(r=3, target_modules="all-linear"))
        assert fuse_lora(load(tiny.emulator)) == 0
        assert not fuse or fuse_lora(model) == 21
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            model.train()(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    ours, theirs = (dict(model.named_parameters()) for model in models)
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-3, atol=1e-5)


class Count(TorchDispatchMode):
    """Operations that write something, and how many numbers they write."""

    def __init__(self):
        super().__init__()
        self.calls, self.written = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        if isinstance(first, torch.Tensor) and not func.is_view and "empty" not in str(func):
            self.calls += 1
            self.written += first.numel()
        return result


def test_it_computes_and_writes_less():
    """Over the step of the model alone."""
    counts = []
    for model in (Attention().requires_grad_(False), *pair()):
        with Count() as count:
            step(model, torch.randn(50, 6, dtype=torch.float64))
        counts.append(count)
    alone, stock, fused = counts
    assert fused.calls - alone.calls < 0.6 * (stock.calls - alone.calls)
    assert fused.written - alone.written < 0.6 * (stock.written - alone.written)


def test_training_uses_it(tiny, tmp_path, monkeypatch):
    fused = []

    def spy(model):
        count = fuse_lora(model)
        fused.append((count, sum(isinstance(m, FusedLora) for m in model.modules())))
        return count

    monkeypatch.setattr(lora_training, "fuse_lora", spy)
    emloc.train(output_dir=tmp_path / "adapter", **{**tiny.train_options, "max_steps": 1})
    assert fused == [(21, 21)]
