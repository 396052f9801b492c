"""Adapters of a base in few bits against stock transformers, bitsandbytes and PEFT, to each of their ends."""

import json
from copy import copy
from types import SimpleNamespace

import bitsandbytes.functional as functional
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from diffusers import BitsAndBytesConfig as DiffusersConfig
from diffusers import UNet2DConditionModel
from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

import emloc
from emloc.adapters.rounding import RoundedBase, Rounding
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.errors import ConfigError, DependencyError, MemoryLimitError, MismatchError
from emloc.extend.opening import open_model
from emloc.extend.plugin_options import of_family
from emloc.integrations.bitsandbytes.rounded_weight import PART, rounded
from emloc_diffusion.example import write_example
from emloc_llm.example import write_model, write_rows
from emloc_vlm.example import write_model as write_vlm
from emloc_vlm.example import write_rows as write_vlm_rows

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
COMPUTE = {"bnb_4bit_compute_dtype": torch.float32}


def fragile(model):
    """Make rounding coarse: a weight in each block of 64 is far larger than the others."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight[:, ::40] *= 12
    return model


def train_qlora(base, data, folder, steps, config=None, **lora):
    """Train a LoRA on the base in few bits with stock libraries; its folder."""
    torch.manual_seed(0)
    config = config or BitsAndBytesConfig(**NF4, **COMPUTE)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config).train()
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **lora}
    model = get_peft_model(model, LoraConfig(**settings))
    checkpoint, family = open_model(base)
    options = {"adapter": "none", "dataset": str(data), "max_length": 96, "output_dir": folder}
    given = of_family(emloc.correct.checked(options, "correct"), family)
    batches = family.calibration_batches(checkpoint, given)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        total, terms = family.loss(model, batches[step % len(batches)])
        (total / terms).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, its data, and a QLoRA of it that has learnt a little."""
    root = tmp_path_factory.mktemp("few_bits")
    # Rows of whole blocks, which bitsandbytes' layers decode rightly on every processor.
    base = write_model(root / "base", hidden_size=64, intermediate_size=128)
    fragile(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(base)
    data = write_rows(root / "train.jsonl", 24, seed=1)
    adapter = train_qlora(base, data, root / "qlora", 40)
    common = {"dataset": str(data), "max_length": 96}
    options = {"adapter": str(adapter), "model_name_or_path": str(base), **common}
    return SimpleNamespace(root=root, base=base, data=data, adapter=adapter, options=options)


@pytest.fixture(scope="module")
def chosen(made):
    return emloc.correct(output_dir=made.root / "auto", **made.options)


@pytest.fixture(scope="module")
def dequantised(made):
    options = {**made.options, "dataset": None, "limit": "dequantised", "load_in_4bit": True}
    return emloc.correct(output_dir=made.root / "dequantised", **options)


def stock(base, **settings):
    """The base in few bits as transformers loads it."""
    config = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=config).train()


def stock_weights(model):
    return {
        name: decoded_4bit(module.weight.data, module.weight.quant_state)
        if isinstance(module, Linear4bit)
        else dequantize_bnb_weight(module.weight, module.state)
        for name, module in model.named_modules()
        if isinstance(module, (Linear4bit, Linear8bitLt))
    }


def decoded_4bit(codes, state):
    """bitsandbytes' numbers, decoded as one row.

    On CPUs with AVX512, bitsandbytes (0.50) begins each row of a matrix with a new block, which it does not
    when it quantises; so rows that 64 does not divide come out wrong there, and only there.
    """
    flat = copy(state)
    flat.shape = torch.Size([state.shape.numel()])
    return functional.dequantize_4bit(codes, flat).view(state.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_four_bits_in_parts_are_those_of_one_call(dtype, kind, double):
    for shape in ((3, PART // 2 + 17), (48, 80), (5, 7)):
        weight = torch.randn(shape).to(dtype)
        codes, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type=kind, compress_statistics=double
        )
        found = rounded(weight, Rounding(4, kind, double))
        assert torch.equal(found, decoded_4bit(codes, state))
        assert found.dtype == dtype


def test_eight_bits_in_parts_are_those_of_one_call():
    weight = torch.randn(600, 40, dtype=torch.bfloat16)
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    wanted = functional.int8_vectorwise_dequant(codes, scales)
    assert torch.equal(rounded(weight, Rounding(8)), wanted)


@pytest.mark.parametrize(
    ("settings", "rounding"),
    [
        (NF4, Rounding()),
        ({"load_in_4bit": True}, Rounding(4, "fp4", double_quant=False)),
        ({"load_in_8bit": True}, Rounding(8)),
        (
            {**NF4, "llm_int8_skip_modules": ["lm_head", "v_proj", "model.layers.1"]},
            Rounding(skip=["lm_head", "v_proj", "model.layers.1"]),
        ),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_and_weights_are_those_of_transformers(settings, rounding, kind, tmp_path):
    base = write_model(tmp_path / "base", kind, torch.bfloat16)
    checkpoint, family = open_model(base)
    found = RoundedBase.of(rounding, family, family.skeleton(checkpoint, torch.float32), checkpoint)
    wanted = stock_weights(stock(base, **settings))
    assert list(found.layers) == list(wanted)
    for name, weight in wanted.items():
        assert torch.equal(found.weight(name).float(), weight.float()), name


def test_a_correction_is_the_float64_formula(made, tmp_path):
    options = {**made.options, "dataset": None, "limit": "none", "load_in_4bit": True}
    folder = emloc.correct(output_dir=tmp_path / "c", **options)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (made.adapter, folder))
    weights = stock_weights(stock(made.base, **NF4))
    base = AutoModelForCausalLM.from_pretrained(made.base)
    for name, weight in weights.items():
        key = f"base_model.model.{name}.lora_A.weight"
        a, up = before[key].double(), key.replace("lora_A", "lora_B")
        e = (weight - base.get_submodule(name).weight.data).double()
        wanted = before[up].double() + e @ a.T @ torch.linalg.inv(a @ a.T) / 3
        torch.testing.assert_close(after[up].double(), wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(after[key], before[key])
    assert len(weights) == 21
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(made.base)
    assert "dequantised" not in Manifest.read(folder).summary


def test_tasks_are_not_scored_on_other_weights_than_the_adapters(made, dequantised):
    with pytest.raises(ConfigError, match="runs on dequantised ones; merge it"):
        emloc.evaluate(
            model_name_or_path=made.options["model_name_or_path"],
            adapter=str(dequantised),
            tasks=["arc"],
        )


def test_losses_of_all_ends_are_those_of_what_they_write(made, chosen, dequantised, tmp_path):
    summary = Manifest.read(chosen).summary
    table = summary["calibration_loss"]
    assert list(table) == [
        "0", "0.3", "1", "3", "none", "dequantised", "data 0.25", "data 0.5", "data 0.75", "data 1",
    ]  # fmt: skip
    score = {"dataset": str(made.data), "max_length": 96, "max_new_tokens": 0}

    def loss(**options):
        return emloc.evaluate(**options, **score)["loss"]

    base = {"model_name_or_path": str(made.base)}
    assert table["0"] == pytest.approx(loss(adapter=str(made.adapter), **base), rel=1e-5)
    assert table[summary["limit"]] == pytest.approx(loss(adapter=str(chosen), **base), rel=1e-5)
    merged = emloc.merge(adapter=str(dequantised), output_dir=tmp_path / "m")
    on_dequantised = loss(adapter=str(dequantised), **base)
    assert table["dequantised"] == pytest.approx(on_dequantised, rel=1e-5)
    assert loss(model_name_or_path=str(merged)) == pytest.approx(on_dequantised, rel=1e-5)


def test_a_fragile_model_wants_another_end_than_the_adapter_as_it_is(made, chosen):
    summary = Manifest.read(chosen).summary
    table = summary["calibration_loss"]
    assert table["dequantised"] < 0.95 * table["0"]
    assert summary["limit"] != "0"
    halves = summary["halves"]
    least = min(halves, key=lambda name: halves[name]["chosen_on"])
    assert halves[least]["checked_on"] <= halves["0"]["checked_on"]
    assert summary["limit"] == least


def test_the_dequantised_end_leaves_the_adapter_as_it_is(made, dequantised):
    before, after = (
        load_file(f / "adapter_model.safetensors") for f in (made.adapter, dequantised)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    manifest = Manifest.read(dequantised)
    assert manifest.kind == "corrected_adapter"
    assert manifest.emulator is None
    assert Rounding.runs_on(manifest) == Rounding()
    assert emloc.verify(path=dequantised)["layers"] == 21


def test_its_merged_model_is_stock_pefts_on_the_dequantised_weights(made, dequantised, tmp_path):
    merged = emloc.merge(adapter=str(dequantised), output_dir=tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(made.base)
    with torch.no_grad():
        for name, weight in stock_weights(stock(made.base, **NF4)).items():
            plain.get_submodule(name).weight.copy_(weight)
    plain = plain.double()
    wanted = PeftModel.from_pretrained(plain, made.adapter).merge_and_unload().state_dict()
    found = load_file(merged / "model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), wanted[name].double(), rtol=1e-6, atol=1e-6)
    base = load_file(made.base / "model.safetensors")
    assert torch.equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert emloc.verify(path=merged)["kind"] == "merged_model"
    ids = torch.randint(3, 250, (2, 9))
    on_bits = PeftModel.from_pretrained(stock(made.base, **NF4, **COMPUTE), made.adapter).train()
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(merged)(input_ids=ids).logits
        trained = on_bits(input_ids=ids).logits
    torch.testing.assert_close(ours, trained, rtol=1e-3, atol=1e-3 * float(trained.abs().max()))


def test_layers_without_a_lora_are_dequantised_too(made, tmp_path):
    adapter = train_qlora(made.base, made.data, tmp_path / "a", 1, target_modules=["q_proj"])
    options = {"model_name_or_path": str(made.base), "limit": "dequantised"}
    folder = emloc.correct(adapter=str(adapter), output_dir=tmp_path / "c", **options)
    merged = emloc.merge(adapter=str(folder), output_dir=tmp_path / "m")
    found = load_file(merged / "model.safetensors")
    for name, weight in stock_weights(stock(made.base, **NF4)).items():
        assert torch.equal(found[f"{name}.weight"], weight) == ("q_proj" not in name)


@pytest.mark.parametrize("bits", [4, 8])
def test_dora_and_eight_bits_run_on_each_end_as_peft_runs_them(made, tmp_path, bits):
    """DoRA on 4 bits; on 8 bits bitsandbytes cannot run it on a CPU, so a LoRA there."""
    settings = NF4 if bits == 4 else {"load_in_8bit": True}
    config = BitsAndBytesConfig(**settings, **COMPUTE)
    adapter = train_qlora(made.base, made.data, tmp_path / "a", 2, config, use_dora=bits == 4)
    given = {**made.options, "adapter": str(adapter), f"load_in_{bits}bit": True}
    folder = emloc.correct(output_dir=tmp_path / "c", **given)
    table = Manifest.read(folder).summary["calibration_loss"]
    score = {"dataset": str(made.data), "max_length": 96, "max_new_tokens": 0}
    base = {"model_name_or_path": str(made.base)}
    plain = emloc.evaluate(adapter=str(adapter), **base, **score)["loss"]
    assert table["0"] == pytest.approx(plain, rel=1e-4)
    end = emloc.correct(
        output_dir=tmp_path / "d", **{**given, "dataset": None, "limit": "dequantised"}
    )
    merged = emloc.merge(adapter=str(end), output_dir=tmp_path / "m")
    loss = emloc.evaluate(model_name_or_path=str(merged), **score)["loss"]
    assert table["dequantised"] == pytest.approx(loss, rel=1e-4)


def test_the_model_that_it_was_trained_on_says_how_it_was_held(made, tmp_path):
    light = tmp_path / "light"
    stock(made.base, load_in_4bit=True, bnb_4bit_quant_type="fp4").save_pretrained(light)
    adapter = tmp_path / "a"
    adapter.mkdir()
    config = json.loads((made.adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(light)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(made.adapter / "adapter_model.safetensors")
    save_file(tensors, adapter / "adapter_model.safetensors")
    given = {"adapter": str(adapter), "model_name_or_path": str(made.base), "limit": "dequantised"}
    folder = emloc.correct(output_dir=tmp_path / "c", **given)
    assert Rounding.runs_on(Manifest.read(folder)) == Rounding(4, "fp4", double_quant=False)
    with pytest.raises(ConfigError, match="bnb_4bit_quant_type=nf4 contradicts"):
        emloc.correct(output_dir=tmp_path / "x", bnb_4bit_quant_type="nf4", **given)
    with pytest.raises(MismatchError, match="is quantised or an emulator; pass the original"):
        emloc.correct(output_dir=tmp_path / "x", adapter=str(adapter), limit="dequantised")
    own = json.loads((light / "config.json").read_text())
    for method in ("gptq", "awq"):
        own["quantization_config"] = {"quant_method": method, "bits": 4}
        (light / "config.json").write_text(json.dumps(own))
        with pytest.raises(MismatchError, match=f"which {method} holds in few bits"):
            emloc.correct(output_dir=tmp_path / "x", **given)
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_is_refused(made, dequantised, tmp_path, monkeypatch):
    def correct(**options):
        emloc.correct(output_dir=tmp_path / "x", **{**made.options, **options})

    common = {"dataset": str(made.data), "max_length": 96}
    emulator = emloc.compress(
        model_name_or_path=str(made.base),
        output_dir=tmp_path / "e",
        format="low_rank",
        keep_ratio=0.5,
        **common,
    )
    train = {"max_steps": 1, "lora_r": 2, **common}
    with pytest.raises(ConfigError, match="load_in_4bit is about a base in few bits"):
        correct(emulator=str(emulator), load_in_4bit=True)
    with pytest.raises(ConfigError, match="leave it out if there is an emulator"):
        correct(emulator=str(emulator), limit="dequantised")
    with pytest.raises(ConfigError, match="contradict each other"):
        correct(load_in_8bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(ConfigError, match="has no layer that bitsandbytes holds in few bits"):
        correct(llm_int8_skip_modules=["model", "lm_head"])
    with pytest.raises(MismatchError, match="is already corrected"):
        correct(adapter=str(dequantised))
    on_emulator = emloc.train(emulator=str(emulator), output_dir=tmp_path / "a", **train)
    with pytest.raises(MismatchError, match="trained on the emulator .*; pass that as emulator"):
        correct(adapter=str(on_emulator))
    (on_emulator / "emloc.json").unlink()
    with pytest.raises(MismatchError, match="trained on the emulator .*; pass that as emulator"):
        correct(adapter=str(on_emulator))
    on_base = emloc.train(model_name_or_path=str(made.base), output_dir=tmp_path / "b", **train)
    with pytest.raises(MismatchError, match="in full precision"):
        correct(adapter=str(on_base))
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    with pytest.raises(DependencyError, match=r"pip install 'emloc\[bitsandbytes\]'"):
        correct()
    assert not (tmp_path / "x").exists()


def test_candidates_that_are_given_are_all(made, tmp_path):
    folder = emloc.correct(
        output_dir=tmp_path / "c", limit_candidates=[1], strength_candidates=[0.5],
        num_calibration_samples=4, **made.options,
    )  # fmt: skip
    assert list(Manifest.read(folder).summary["calibration_loss"]) == ["0", "1", "data 0.5"]


def test_memory_is_planned_with_what_is_made_anew(made, tmp_path):
    with pytest.raises(MemoryLimitError, match="dequantised block|the same in few bits"):
        emloc.correct(output_dir=tmp_path / "x", memory="20KiB", **made.options)
    folder = emloc.correct(output_dir=tmp_path / "c", memory="2GiB", **made.options)
    assert Manifest.read(folder).measured["planned_bytes"] > 0


def test_a_pipelines_layers_are_those_of_diffusers(tmp_path):
    options = write_example(tmp_path, 0)
    checkpoint, family = open_model(options["model_name_or_path"])
    model = family.skeleton(checkpoint, torch.float32)
    unet = UNet2DConditionModel.from_pretrained(checkpoint.path, subfolder="unet")
    for skip in (None, ["to_k", "mid_block"]):
        copy = UNet2DConditionModel.from_config(unet.config)
        config = DiffusersConfig(**NF4, llm_int8_skip_modules=skip)
        replaced = replace_with_bnb_linear(copy, skip or [], quantization_config=config)
        wanted = [n for n, m in replaced.named_modules() if isinstance(m, Linear4bit)]
        found = RoundedBase.of(Rounding(skip=skip), family, model, checkpoint)
        assert list(found.layers) == wanted
    lora = get_peft_model(unet, LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "conv1"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    lora.save_pretrained(tmp_path / "a")
    given = {**options, "adapter": str(tmp_path / "a"), "num_calibration_samples": 2}
    auto = emloc.correct(output_dir=tmp_path / "auto", **given)
    assert "dequantised" in Manifest.read(auto).summary["calibration_loss"]
    end = emloc.correct(
        output_dir=tmp_path / "c",
        adapter=str(tmp_path / "a"),
        model_name_or_path=options["model_name_or_path"],
        limit="dequantised",
    )
    merged = Checkpoint.open(emloc.merge(adapter=str(end), output_dir=tmp_path / "m"))
    whole = RoundedBase.of(Rounding(), family, model, checkpoint)
    rounded_names = set(whole.layers)
    for name in merged.tensors:
        layer = name.removesuffix(".weight")
        weight = checkpoint.read(name)
        if name.endswith(".weight") and layer in rounded_names:
            codes, state = functional.quantize_4bit(
                weight, blocksize=64, quant_type="nf4", compress_statistics=True
            )
            weight = decoded_4bit(codes, state)
        if f"{layer}.weight" == name and layer.endswith(("to_q", "conv1")):
            a, b = (lora.get_submodule(f"base_model.model.{layer}.lora_{x}.default") for x in "AB")
            delta = 2 * b.weight.flatten(1) @ a.weight.flatten(1)
            weight = weight + delta.view(weight.shape)
        torch.testing.assert_close(merged.read(name), weight, rtol=1e-5, atol=1e-6)


def test_a_vision_language_model_in_few_bits(tmp_path):
    """Both towers and the projector, as transformers rounds them; to all ends."""
    base = write_vlm(tmp_path / "base")
    data = write_vlm_rows(tmp_path / "train.jsonl", 4, seed=1)
    config = BitsAndBytesConfig(**NF4, **COMPUTE)
    model = AutoModelForImageTextToText.from_pretrained(base, quantization_config=config).train()
    checkpoint, family = open_model(base)
    skeleton = family.skeleton(checkpoint, torch.float32)
    held = RoundedBase.of(Rounding(), family, skeleton, checkpoint)
    weights = stock_weights(model)
    assert list(held.layers) == list(weights)
    for name, weight in weights.items():
        assert torch.equal(held.weight(name), weight), name
    lora = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "fc1"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    lora.save_pretrained(tmp_path / "a")
    given = {"adapter": str(tmp_path / "a"), "model_name_or_path": str(base)}
    scored = {"dataset": str(data), "max_length": 96}
    auto = emloc.correct(output_dir=tmp_path / "auto", **given, **scored)
    end = emloc.correct(output_dir=tmp_path / "end", limit="dequantised", **given)
    merged = emloc.merge(adapter=str(end), output_dir=tmp_path / "m")
    loss = emloc.evaluate(model_name_or_path=str(merged), max_new_tokens=0, **scored)["loss"]
    table = Manifest.read(auto).summary["calibration_loss"]
    assert table["dequantised"] == pytest.approx(loss, rel=1e-5)
    assert abs(table["0"] - loss) > 1e-3 * loss
