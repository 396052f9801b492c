"""LoRAs on text encoders: trained along, carried through every stage, loaded by stock diffusers."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

import emloc
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.config import CorrectConfig
from emloc.errors import CheckpointError, ConfigError, MismatchError, NumericalError
from emloc.extend.plugin_options import with_plugin_options
from emloc.integrations.peft.attach import attach
from emloc.testing.resealed import resealed
from emloc_diffusion import text_training
from emloc_diffusion.denoisers import denoiser_of
from emloc_diffusion.drawing import draw
from emloc_diffusion.encode.text import encode_prompts
from emloc_diffusion.example import write_pictures
from emloc_diffusion.example_pipelines import RESOLUTION, write_pipeline
from emloc_diffusion.family import DiffusionFamily
from emloc_diffusion.loading import load_denoiser
from emloc_diffusion.samples import Samples
from emloc_diffusion.text_training import TextTraining

PROMPT = "a photo of sks square"
NAME = "adapter_model.safetensors"
ENCODERS = {"sd": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    base = write_pipeline(root / "base", request.param, seed=1)
    data = {
        "dataset": str(write_pictures(root / "pictures", 3, seed=2)), "instance_prompt": PROMPT,
        "resolution": RESOLUTION,
    }  # fmt: skip
    emulator = emloc.compress(
        model_name_or_path=str(base), output_dir=root / "emulator", format="low_rank", keep_ratio=0.5,
        num_calibration_samples=4, **data,
    )  # fmt: skip
    train = {
        "max_train_steps": 4, "save_steps": 2, "logging_steps": 1, "train_batch_size": 2,
        "learning_rate": 1e-2, "lora_r": 3, "lora_alpha": 5, "train_text_encoder": True, **data,
    }  # fmt: skip
    adapter = emloc.train(emulator=str(emulator), output_dir=root / "adapter", **train)
    corrected = emloc.correct(
        adapter=str(adapter), emulator=str(emulator), output_dir=root / "corrected",
        num_calibration_samples=4, limit_candidates=[1.0], **data,
    )  # fmt: skip
    return SimpleNamespace(kind=request.param, root=root, base=base, data=data, train=train,
                           emulator=emulator, adapter=adapter, corrected=corrected)  # fmt: skip


def encoded(folder, adapter=None):
    lora = Adapter.open(str(adapter)) if adapter else None
    return encode_prompts(folder, [PROMPT], adapter=lora)[0]


def test_every_encoder_learns(made):
    for name in ENCODERS[made.kind]:
        tensors = load_file(made.adapter / name / NAME)
        layers = {key.split(".lora_")[0].rsplit(".", 1)[1] for key in tensors}
        assert layers == set(text_training.TARGETS)
        # SDXL reads the last layer but one, and of its second encoder the pooled last one too.
        unread = "layers.2." if (made.kind, name) == ("sdxl", "text_encoder") else "none"
        assert all(bool(t.any()) or unread in key for key, t in tensors.items())
        config = json.loads((made.adapter / name / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (3, 5)
    manifest = Manifest.read(made.adapter)
    sizes = {
        path: sum(t.nbytes for t in load_file(made.adapter / path).values())
        for path in manifest.files
        if path.endswith(NAME)
    }
    assert len(sizes) == 1 + len(ENCODERS[made.kind])
    assert manifest.summary["trainable_bytes"] == sum(sizes.values())


def test_correction_carries_them_over(made):
    for name in ENCODERS[made.kind]:
        ours, theirs = (folder / name for folder in (made.corrected, made.adapter))
        assert (ours / NAME).read_bytes() == (theirs / NAME).read_bytes()
        config = json.loads((ours / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(made.base)
    before, after = (load_file(folder / NAME) for folder in (made.adapter, made.corrected))
    changed = any(not torch.equal(before[key], after[key]) for key in before)
    assert changed == (Manifest.read(made.corrected).summary["limit"] != "0")
    assert emloc.verify(path=made.corrected)["layers"] == sum(
        len(load_file(made.corrected / path)) // 2
        for path in Manifest.read(made.corrected).files
        if path.endswith(NAME)
    )


def test_the_limit_is_chosen_with_the_trained_encoders(made):
    config = with_plugin_options(CorrectConfig)(
        adapter=str(made.adapter), emulator="e", output_dir="o", num_calibration_samples=2,
        **made.data,
    )  # fmt: skip
    [batch] = DiffusionFamily().calibration_batches(Checkpoint.open(made.base), config)
    trained, plain = encoded(made.base, made.adapter), encoded(made.base)
    for name, tensor in trained.items():
        assert torch.equal(batch[name][0], tensor)
        assert not torch.allclose(tensor, plain[name], atol=1e-3)


def denoised(model, base, conditions):
    generator = torch.Generator().manual_seed(3)
    batch = {
        "sample": torch.randn(1, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([400.0]),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
        **{name: tensor[None] for name, tensor in conditions.items()},
    }
    with torch.no_grad():
        return denoiser_of(Checkpoint.open(base)).predict(model, batch)


@pytest.mark.parametrize("weights", ["pytorch_lora_weights.safetensors", "kohya_lora.safetensors"])
def test_stock_diffusers_predicts_the_same(made, weights):
    """One file changes denoiser and text encoders, to what evaluate's own model predicts."""
    checkpoint = Checkpoint.open(made.base)
    model = load_denoiser(checkpoint, "float32", "cpu")
    plain = denoised(model, made.base, encoded(made.base))
    tuned = attach(model, str(made.corrected), checkpoint, DiffusionFamily())
    expected = denoised(tuned, made.base, encoded(made.base, made.corrected))
    pipeline = DiffusionPipeline.from_pretrained(made.base)
    pipeline.load_lora_weights(made.corrected, weight_name=weights)
    with torch.no_grad():
        stock = pipeline.encode_prompt(
            PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    conditions = {"encoder_hidden_states": stock[0][0]}
    if made.kind == "sdxl":
        conditions["pooled"] = stock[2][0]
    for name, tensor in encoded(made.base, made.corrected).items():
        torch.testing.assert_close(conditions[name], tensor, rtol=1e-4, atol=1e-4)
    found = denoised(pipeline.unet, made.base, conditions)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    halfway = denoised(pipeline.unet, made.base, encoded(made.base))
    assert not torch.allclose(halfway, expected, atol=1e-2)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_merged_scores_as_the_adapter_does(made):
    merged = emloc.merge(adapter=str(made.corrected), output_dir=made.root / "merged")
    for name, tensor in encoded(made.base, made.corrected).items():
        torch.testing.assert_close(encoded(merged)[name], tensor, rtol=1e-4, atol=1e-4)
    fast = {"num_noise_samples": 8, **made.data}
    adapted = emloc.evaluate(
        model_name_or_path=str(made.base), adapter=str(made.corrected), **fast
    )["loss"]
    assert emloc.evaluate(model_name_or_path=str(merged), **fast)["loss"] == pytest.approx(
        adapted, rel=1e-4
    )
    without = shutil.copytree(made.corrected, made.root / "without")
    for name in ENCODERS[made.kind]:
        shutil.rmtree(without / name)
    resealed(without)
    alone = emloc.evaluate(model_name_or_path=str(made.base), adapter=str(without), **fast)["loss"]
    assert abs(alone - adapted) > 1e-4
    assert emloc.verify(path=merged)["kind"] == "merged_model"
    manifest = Manifest.read(merged)
    assert {f"{name}/model.safetensors" for name in ENCODERS[made.kind]} <= manifest.files.keys()
    # All that is not adapted is the base's, byte for byte.
    ours, theirs = (
        load_file(folder / "text_encoder/model.safetensors") for folder in (merged, made.base)
    )
    changed = {key for key in theirs if not torch.equal(ours[key], theirs[key])}
    assert all(key.rsplit(".", 2)[1] in text_training.TARGETS for key in changed)
    assert changed


def test_training_resumes_exactly(made, monkeypatch):
    from emloc.integrations.transformers.training import Progression

    original = Progression.on_step_end

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

    options = {**made.train, "emulator": str(made.emulator), "output_dir": made.root / "again"}
    monkeypatch.setattr(Progression, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        emloc.train(**options)
    monkeypatch.setattr(Progression, "on_step_end", original)
    partial = made.root / "again.partial"
    # Only what is trained is kept.
    held = load_file(partial / "checkpoint-2" / "model.safetensors")
    assert all("lora_" in key for key in held)
    again = emloc.train(**options)
    for path in Manifest.read(again).files:
        if path.endswith(".safetensors"):
            assert (again / path).read_bytes() == (made.adapter / path).read_bytes(), path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    base = write_pipeline(root / "base", "sd", seed=3)
    options = {
        "model_name_or_path": str(base), "instance_prompt": PROMPT, "resolution": RESOLUTION,
        "dataset": str(write_pictures(root / "pictures", 3, seed=4)), "train_text_encoder": True,
    }  # fmt: skip
    return SimpleNamespace(root=root, base=base, options=options)


def test_a_step_is_that_of_autograd_through_both_models(tiny, tmp_path, monkeypatch):
    """B begins at zero, so after one step of plain gradient descent it is −η times its gradient."""
    batches = []
    original = Samples.batch

    def record(*args):
        batches.append(original(*args))
        return dict(batches[-1])

    monkeypatch.setattr(Samples, "batch", record)
    prior = {
        "class_data_dir": str(write_pictures(tmp_path / "class", 2, seed=5)),
        "class_prompt": "a photo of square", "prior_loss_weight": 0.7,
    }  # fmt: skip
    rate = 0.5
    adapter = emloc.train(
        output_dir=tmp_path / "a", max_train_steps=1, train_batch_size=2, optim="sgd",
        learning_rate=rate, warmup_ratio=0.0, max_grad_norm=1e9, lora_r=2, lora_alpha=6,
        lora_target_modules="to_q,to_v", **tiny.options, **prior,
    )  # fmt: skip
    [batch] = batches
    pipeline = DiffusionPipeline.from_pretrained(tiny.base)
    models = {}
    for name, targets in (("unet", ["to_q", "to_v"]), ("text_encoder", [*text_training.TARGETS])):
        lora = LoraConfig(r=2, lora_alpha=6, target_modules=targets)
        model = get_peft_model(getattr(pipeline, name), lora)
        saved = load_file(adapter / ("" if name == "unet" else name) / NAME)
        for key, tensor in saved.items():
            if "lora_A" in key:
                model.get_parameter(key.replace(".weight", ".default.weight")).data.copy_(tensor)
        models[name] = (model, saved)
    prompts = [PROMPT] * 2 + ["a photo of square"] * 2
    states = pipeline.encode_prompt(
        prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    predicted = pipeline.unet(batch["sample"], batch["timestep"], states).sample
    losses = (predicted - batch["target"]).square().mean((1, 2, 3))
    (losses[:2].mean() + 0.7 * losses[2:].mean()).backward()
    for model, saved in models.values():
        ups = {key: tensor for key, tensor in saved.items() if "lora_B" in key}
        for key, tensor in ups.items():
            gradient = model.get_parameter(key.replace(".weight", ".default.weight")).grad
            torch.testing.assert_close(tensor, -rate * gradient, rtol=1e-3, atol=1e-6)
        assert any(bool(tensor.any()) for tensor in ups.values())


def test_gradient_checkpointing_changes_nothing(tiny, tmp_path):
    folders = [
        emloc.train(
            output_dir=tmp_path / str(on), max_train_steps=2, gradient_checkpointing=on,
            **tiny.options,
        )
        for on in (False, True)
    ]  # fmt: skip
    for path in (NAME, f"text_encoder/{NAME}"):
        plain, again = (load_file(folder / path) for folder in folders)
        for key, tensor in plain.items():
            torch.testing.assert_close(again[key], tensor, rtol=1e-4, atol=1e-6)


def test_validation_draws_with_both(tiny, tmp_path):
    """The last picture is the one that a stock pipeline draws with what was saved."""
    folder = emloc.train(
        output_dir=tmp_path / "a", max_train_steps=2, learning_rate=1e-2, lora_alpha=64,
        validation_prompt=PROMPT, validation_steps=2, num_validation_images=1,
        num_inference_steps=2, lora_dropout=0.1, report_to=["tensorboard"], **tiny.options,
    )  # fmt: skip
    drawn = Image.open(folder / "validation" / "step-2-0.png")
    pipeline = DiffusionPipeline.from_pretrained(tiny.base)
    pipeline.set_progress_bar_config(disable=True)
    [plain] = draw(pipeline, [PROMPT], 1, RESOLUTION, 2)
    pipeline.load_lora_weights(folder)
    [expected] = draw(pipeline, [PROMPT], 1, RESOLUTION, 2)
    pipeline.text_encoder.disable_adapters()
    [halfway] = draw(pipeline, [PROMPT], 1, RESOLUTION, 2)

    def difference(picture):
        return np.abs(np.asarray(picture, dtype=float) - np.asarray(drawn, dtype=float)).max()

    assert difference(expected) <= 1
    assert difference(plain) > 3
    assert difference(halfway) > 3


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_conditions_are_the_pipelines(kind, tmp_path):
    """Prompts of a micro-batch in any order; T5 is no longer there."""
    base = write_pipeline(tmp_path / "base", kind, seed=1)
    captions = ["a red circle", "sks square", "a red circle"]
    text = TextTraining(base, captions, torch.float32, "cpu", False)
    expected = encode_prompts(base, captions)
    found = text.conditions([2, 1, 0, 1])
    for row, position in enumerate([2, 1, 0, 1]):
        for name, tensor in expected[position].items():
            torch.testing.assert_close(found[name][row], tensor, rtol=1e-5, atol=1e-5)
    assert set(text.parts) == {
        "sd": {"text_encoder"}, "sd3": {"text_encoder", "text_encoder_2"}, "flux": {"text_encoder"},
    }[kind]  # fmt: skip
    held = [type(m).__name__ for m in text._encoder._pipeline.components.values()]
    assert "T5EncoderModel" not in held
    assert held.count("Remembered") == (kind != "sd")


def test_half_precision_encoders_are_trained(tmp_path, tiny):
    base = write_pipeline(tmp_path / "base", "sd", seed=3, dtype=torch.bfloat16)
    options = {**tiny.options, "model_name_or_path": str(base)}
    folder = emloc.train(output_dir=tmp_path / "a", max_train_steps=1, warmup_ratio=0.0, **options)
    tensors = load_file(folder / "text_encoder" / NAME)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(bool(t.any()) for key, t in tensors.items() if "lora_B" in key)


def test_bad_input_is_one_sentence(made, tiny, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="lora_init=pissa applies to the main model"):
        emloc.train(output_dir=tmp_path / "x", lora_init="pissa", **tiny.options)
    with monkeypatch.context() as patch:
        patch.setattr(text_training, "CLIP", "other")
        with pytest.raises(ConfigError, match="has no CLIP text encoder"):
            emloc.train(output_dir=tmp_path / "x", **tiny.options)
    if made.kind != "sd":
        return
    # A pipeline whose UNet is the same and whose text encoder is another.
    other = shutil.copytree(made.base, tmp_path / "other")
    weights = other / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: t + 0.1 for k, t in tensors.items()}, weights, metadata={"format": "pt"})
    with pytest.raises(MismatchError, match="the text_encoder of .* holds other weights"):
        emloc.correct(
            adapter=str(made.adapter), emulator=str(made.emulator), output_dir=tmp_path / "c",
            model_name_or_path=str(other), limit="none",
        )  # fmt: skip
    narrow = write_pipeline(tmp_path / "narrow", "sd", seed=1, cross_attention_dim=12)
    for part in ("unet", "vae"):
        shutil.rmtree(narrow / part)
        shutil.copytree(made.base / part, narrow / part)
    with pytest.raises(MismatchError, match="has no layer encoder.layers.0.self_attn.*of 20x20"):
        emloc.evaluate(model_name_or_path=str(narrow), adapter=str(made.corrected), **made.data)
    with pytest.raises(MismatchError, match="another base model"):
        emloc.merge(
            adapter=str(made.corrected), model_name_or_path=str(narrow), output_dir=tmp_path / "m"
        )
    # What was written is checked, wherever it lies.
    broken = shutil.copytree(made.corrected, tmp_path / "broken")
    tensors = load_file(broken / "text_encoder" / NAME)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] * float("nan")}, broken / "text_encoder" / NAME)
    with pytest.raises(CheckpointError, match="text_encoder.*is not what was written"):
        emloc.verify(path=broken)
    (broken / "emloc.json").unlink()
    with pytest.raises(NumericalError, match="text_encoder/.*NaN"):
        emloc.verify(path=broken)
    with pytest.raises(NumericalError, match="is NaN or infinite"):
        emloc.merge(adapter=str(broken), output_dir=tmp_path / "m")


def test_a_merged_part_leaves_no_variant_without_the_lora(tmp_path):
    """`variant="fp16"` would else load a merged UNet beside a text encoder that is not."""
    base = write_pipeline(tmp_path / "base", "sd", seed=1)
    DiffusionPipeline.from_pretrained(base, dtype=torch.float16).save_pretrained(
        base, variant="fp16"
    )
    adapter = emloc.train(
        model_name_or_path=str(base), output_dir=tmp_path / "a", max_train_steps=2, lora_r=2,
        learning_rate=0.1, train_text_encoder=True, instance_prompt=PROMPT, resolution=RESOLUTION,
        dataset=str(write_pictures(tmp_path / "pictures", 2, seed=2)),
    )  # fmt: skip
    merged = emloc.merge(adapter=str(adapter), output_dir=tmp_path / "m")
    assert (merged / "vae/diffusion_pytorch_model.fp16.safetensors").is_file()
    assert not (merged / "text_encoder/model.fp16.safetensors").exists()
    plain, variant = (
        DiffusionPipeline.from_pretrained(merged, variant=name).text_encoder.state_dict()
        for name in (None, "fp16")
    )
    assert all(torch.equal(plain[name], variant[name]) for name in plain)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_streamed_steps_reach_what_all_blocks_read(kind, tmp_path):
    """The modulation, made of pooled prompts, is read by every block and once more after the last."""
    base = write_pipeline(tmp_path / "base", kind, seed=1)
    options = {
        "model_name_or_path": str(base), "max_train_steps": 2, "lora_r": 2, "learning_rate": 1e-2,
        "train_text_encoder": True, "instance_prompt": PROMPT, "resolution": RESOLUTION, "seed": 3,
        "dataset": str(write_pictures(tmp_path / "pictures", 2, seed=2)), "optim": "sgd",
    }  # fmt: skip
    whole, streamed = (
        emloc.train(output_dir=tmp_path / str(stream), stream=stream, **options)
        for stream in (False, True)
    )
    for file in (NAME, f"text_encoder/{NAME}"):
        wanted, got = load_file(whole / file), load_file(streamed / file)
        assert wanted.keys() == got.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
