"""QLoRA on denoisers: linear layers in NF4 as diffusers makes them, convolutions as they are."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from diffusers import BitsAndBytesConfig
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.extend.methods import Task
from emloc.extend.plugins import families_for, family_named, method_named
from emloc.integrations.diffusers.few_bits import four_bits_anywhere
from emloc_baselines.qlora import Qlora
from emloc_diffusion.denoisers import denoiser_of
from emloc_diffusion.example import RESOLUTION, write_pictures
from emloc_diffusion.example_pipelines import write_pipeline


@pytest.fixture(scope="module", params=["sd", "sd3"])  # convolutions, and linear layers alone
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    base = write_pipeline(root / "base", request.param, 0)
    data = {"dataset": str(write_pictures(root / "pictures", 2, 0)), "resolution": RESOLUTION,
            "instance_prompt": "a photo of sks square"}  # fmt: skip
    train = {**data, "max_steps": 2, "lora_r": 3, "learning_rate": 1e-2, "logging_steps": 1}
    task, method = Task(str(base), 0.5, 0, data, train, {**data, "limit": "none"}), Qlora()
    light = method.build(task, root / "light")
    adapter = method.train(task, light, root / "adapter")
    return base, light, adapter, method.recover(task, light, adapter, root / "recovered")


def denoiser(folder):
    return family_named("diffusion").load(Checkpoint.open(str(folder)), "auto", "cpu")


def own(folder):
    """The base as diffusers quantises it while it loads."""
    checkpoint = Checkpoint.open(str(folder))
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    with four_bits_anywhere("cpu"):
        return denoiser_of(checkpoint).model_class.from_pretrained(
            folder, subfolder=checkpoint.layout.folder.rstrip("/"), quantization_config=config,
            torch_dtype=torch.float32, device_map={"": "cpu"},
        )  # fmt: skip


def test_every_weight_is_what_diffusers_makes_of_it(made):
    base, light, *_ = made
    dense, held, reference = denoiser(base), denoiser(light), own(base)
    kinds = {name: type(module) for name, module in reference.named_modules()}
    assert kinds == {name: type(module) for name, module in held.named_modules()}
    assert Linear4bit in kinds.values()
    for name, module in dense.named_modules():
        if kinds[name] is Linear4bit:
            layer = held.get_submodule(name)
            packed, state = quantize_4bit(
                module.weight.data, quant_type="nf4", compress_statistics=True
            )
            assert torch.equal(layer.weight.data.flatten(), packed.flatten()), name
            decoded = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(decoded, dequantize_4bit(packed, state)), name
        elif isinstance(module, torch.nn.Conv2d):
            assert torch.equal(held.get_submodule(name).weight, module.weight), name


def test_a_step_is_that_of_stock_diffusers_and_peft(made):
    """The loss of the same LoRA on the same batch, and its gradients."""
    base, light, adapter, _ = made
    family, results = family_named("diffusion"), []
    names = sorted(
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for key in load_file(adapter / "adapter_model.safetensors") if key.endswith("lora_A.weight")
    )  # fmt: skip
    batch = denoiser_of(Checkpoint.open(str(base))).example(denoiser(base).config)
    batch = {k: torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
             if v.is_floating_point() else v for k, v in batch.items()}  # fmt: skip
    batch["target"] = torch.zeros_like(batch["sample"])
    for model in (own(base), denoiser(light)):
        torch.manual_seed(0)
        config = LoraConfig(r=3, target_modules=names, init_lora_weights=False)
        tuned = get_peft_model(model.train(), config)
        loss, _ = family.loss(tuned, batch)
        loss.backward()
        gradients = [p.grad for p in tuned.parameters() if p.requires_grad]
        results.append((loss.detach(), gradients))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))
    assert any(bool(gradient.any()) for gradient in results[0][1])


def test_what_is_held_while_training_is_counted(made):
    base, light, adapter, _ = made
    dense, summary = denoiser(base), Manifest.read(adapter).summary
    held = summary["train_weight_bytes"] - summary["trainable_bytes"]
    linear = [m for m in dense.modules() if isinstance(m, torch.nn.Linear)]
    codes = sum(m.weight.numel() for m in linear)
    buffers = dense.state_dict().keys() - dict(dense.named_parameters()).keys()
    rest = sum(p.numel() * 4 for p in dense.parameters()) - 4 * codes
    rest += sum(dense.get_buffer(name).nbytes for name in buffers)
    tables = len(linear) * (16 * 4 + 256 * 4 + 300)
    assert rest + codes * 4.125 / 8 < held < rest + codes * 4.2 / 8 + tables
    assert {p.dtype for p in denoiser(light).parameters()} == {torch.float32, torch.uint8}


def test_the_adapter_is_one_of_the_original(made, tmp_path):
    base, light, adapter, recovered = made
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapter, recovered)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert any(bool(after[key].any()) for key in after if "lora_B" in key)
    assert Manifest.read(recovered).base_model.name_or_path == str(base)
    assert (recovered / "pytorch_lora_weights.safetensors").is_file()
    assert emloc.verify(path=recovered)["kind"] == "corrected_adapter"
    assert emloc.verify(path=light)["kind"] == "emulator"
    merged = emloc.merge(adapter=str(recovered), output_dir=tmp_path / "merged")
    assert emloc.verify(path=merged)["kind"] == "merged_model"


def test_the_families_that_have_it():
    assert set(families_for(method_named("qlora"))) == {"llm", "vlm", "diffusion"}


def test_a_text_encoders_lora_comes_back_too(tmp_path):
    base = write_pipeline(tmp_path / "base", "sd", 0)
    data = {"dataset": str(write_pictures(tmp_path / "pictures", 2, 0)), "resolution": RESOLUTION,
            "instance_prompt": "a photo of sks square"}  # fmt: skip
    train = {**data, "max_steps": 1, "lora_r": 2, "learning_rate": 1e-2, "train_text_encoder": True}
    task, method = Task(str(base), 0.5, 0, data, train, {**data, "limit": "none"}), Qlora()
    light = method.build(task, tmp_path / "light")
    adapter = method.train(task, light, tmp_path / "adapter")
    recovered = method.recover(task, light, adapter, tmp_path / "recovered")
    part = "text_encoder/adapter_model.safetensors"
    one, other = load_file(adapter / part), load_file(recovered / part)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    written = load_file(recovered / "pytorch_lora_weights.safetensors")
    assert any(name.startswith("text_encoder") for name in written)
    assert emloc.verify(path=str(recovered))["kind"] == "corrected_adapter"
