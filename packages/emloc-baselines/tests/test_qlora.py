"""NF4 against bitsandbytes' own; the adapter goes back to the original weights as it is."""

import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.errors import MismatchError
from emloc.extend.methods import Task
from emloc.extend.plugins import family_named
from emloc_baselines.nf4 import quantise
from emloc_baselines.qlora import Qlora, _linear_layers


def task_of(base, data, **more):
    common = {"dataset": str(data), "max_length": 96}
    train = {**common, "max_steps": 3, "lora_r": 3, "lora_alpha": 12, "learning_rate": 1e-2,
             "logging_steps": 1}  # fmt: skip
    return Task(str(base), 0.5, 0, common, {**train, **more}, {**common, "limit": "none"})


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Light model, adapter and recovered adapter."""
    root, task = tmp_path_factory.mktemp("qlora"), task_of(tiny.base, tiny.data)
    method = Qlora()
    light = method.build(task, root / "light")
    adapter = method.train(task, light, root / "adapter")
    return light, adapter, method.recover(task, light, adapter, root / "recovered"), task


def linear_names(model):
    return [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]


def test_weights_are_what_bitsandbytes_makes_of_them(made, tiny):
    light, *_ = made
    base = AutoModelForCausalLM.from_pretrained(tiny.base, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(light)
    for name in linear_names(base):
        packed, state = quantize_4bit(
            base.get_submodule(name).weight.data, quant_type="nf4", compress_statistics=True
        )
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear4bit), name
        assert torch.equal(layer.weight.data, packed)
        decoded = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(decoded, dequantize_4bit(packed, state)), name
        assert not torch.equal(decoded, base.get_submodule(name).weight)
    assert type(model.lm_head) is torch.nn.Linear
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)


def test_logits_are_those_of_transformers_own_quantisation(made, tiny):
    light, *_ = made
    own = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    reference = AutoModelForCausalLM.from_pretrained(tiny.base, quantization_config=own)
    ids = torch.randint(3, 250, (2, 9))
    with torch.no_grad():
        # In evaluation bitsandbytes repacks weights for some CPUs, which needs wider layers.
        expected = reference.train()(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(light).train()(input_ids=ids).logits
    assert torch.equal(found, expected)


def test_the_adapter_is_the_trained_one_named_for_the_original(made, tiny):
    _, adapter, recovered, _ = made
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(recovered / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert any(bool(after[key].any()) for key in after if "lora_B" in key)
    config = json.loads((recovered / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny.base)
    manifest = Manifest.read(recovered)
    assert (manifest.kind, manifest.method) == ("corrected_adapter", "qlora")
    base = AutoModelForCausalLM.from_pretrained(tiny.base)
    tuned = PeftModel.from_pretrained(base, recovered)
    names = {n for n, m in tuned.named_modules() if n.endswith("lora_A")}
    assert len(names) == 21


def test_it_holds_about_four_bits_per_weight_while_training(made, tiny):
    _, adapter, *_ = made
    summary = Manifest.read(adapter).summary
    held = summary["train_weight_bytes"] - summary["trainable_bytes"]
    tensors = load_file(tiny.base / "model.safetensors")
    linear = sum(t.numel() for n, t in tensors.items() if "proj" in n)
    other = sum(t.numel() * 4 for n, t in tensors.items() if "proj" not in n)
    # Two tables of 16 and 256 floats and a state of some 100 bytes per layer, on top of 4.13 bits.
    tables = 21 * (16 * 4 + 256 * 4 + 200)
    assert other + linear * 4.125 / 8 < held < other + linear * 4.13 / 8 + tables


def test_the_original_can_be_merged_verified_and_scored_with_it(made, tiny, tmp_path):
    light, _, recovered, _ = made
    assert emloc.verify(path=recovered)["layers"] == 21
    assert emloc.verify(path=light)["kind"] == "emulator"
    merged = emloc.merge(adapter=str(recovered), output_dir=tmp_path / "merged")
    data = {"dataset": str(tiny.test), "max_length": 96, "max_new_tokens": 0}
    one = emloc.evaluate(model_name_or_path=str(merged), **data)["loss"]
    other = emloc.evaluate(model_name_or_path=str(tiny.base), adapter=str(recovered), **data)[
        "loss"
    ]
    assert one == pytest.approx(other, rel=1e-4)


def test_its_adapter_is_not_corrected(made, tmp_path, tiny):
    light, adapter, recovered, _ = made
    with pytest.raises(MismatchError, match="light model of the method qlora"):
        emloc.correct(
            adapter=str(adapter), emulator=str(light), output_dir=tmp_path / "x", limit="none"
        )
    task = task_of(tiny.base, tiny.data)
    with pytest.raises(MismatchError, match="already belongs to the original"):
        Qlora().recover(task, light, recovered, tmp_path / "y")
    other = emloc.train(
        model_name_or_path=str(tiny.base),
        output_dir=tmp_path / "z",
        **{**task.train, "max_steps": 1},
    )
    with pytest.raises(MismatchError, match="was not trained on"):
        Qlora().recover(task, light, other, tmp_path / "y")


def test_its_adapter_is_taken_to_the_ends_of_a_base_in_few_bits(made, tiny, tmp_path):
    """Without an emulator: the light model says how it was held, and what it was made from."""
    _, adapter, *_ = made
    folder = emloc.correct(
        adapter=str(adapter), output_dir=tmp_path / "c", dataset=str(tiny.data), max_length=96
    )
    manifest = Manifest.read(folder)
    assert manifest.base_model.name_or_path == str(tiny.base)
    assert manifest.settings["rounding"]["bits"] == 4
    assert "dequantised" in manifest.summary["calibration_loss"]


def test_bfloat16_and_doubly_quantised_scales(tiny):
    weight = torch.randn(48, 80, dtype=torch.bfloat16)
    parts = quantise(weight)
    assert parts[""].dtype == torch.uint8
    assert parts[""].numel() == weight.numel() // 2
    assert parts[".absmax"].dtype == torch.uint8
    assert parts[".absmax"].numel() == weight.numel() // 64
    assert parts[".nested_absmax"].dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "head"),
    [("bert", ["classifier"]), ("roberta", ["classifier.dense", "classifier.out_proj"])],
)
def test_the_head_of_a_classifier_stays_as_it_is(kind, head):
    """The module that comes last is dense, as transformers leaves it, and can be trained whole."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = AutoConfig.for_model(kind, vocab_size=30, **sizes)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    layers, kept = _linear_layers(family_named("llm"), model)
    assert list(kept) == head
    assert set(kept) < set(layers)
