"""Training on a subject or on captioned pictures: what is encoded, learnt, said and refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.errors import ConfigError, DataError, OutputError
from emloc_diffusion import samples, training
from emloc_diffusion.data import prompts
from emloc_diffusion.encode.text import PromptEncoder
from emloc_diffusion.example import write_pictures
from emloc_diffusion.example_pipelines import RESOLUTION, write_pipeline
from emloc_diffusion.samples import Samples

PROMPT = "a photo of sks square"


def test_prior_preservation_changes_what_is_learnt(tiny, tmp_path):
    options = {
        "model_name_or_path": str(tiny.base), "instance_data_dir": str(tiny.pictures),
        "instance_prompt": PROMPT, "resolution": RESOLUTION, "max_train_steps": 2,
        "logging_steps": 1,
    }  # fmt: skip
    prior = {
        "class_data_dir": str(write_pictures(tmp_path / "class", 2, seed=5)),
        "class_prompt": "a photo of square",
    }
    losses = {}
    for name, more in {"none": {}, "with": prior, "off": {**prior, "prior_loss_weight": 0}}.items():
        folder = emloc.train(output_dir=tmp_path / name, **options, **more)
        log = (folder / "trainer_log.jsonl").read_text().splitlines()
        losses[name] = json.loads(log[0])["loss"]
    assert losses["with"] > 1.3 * losses["off"]
    emloc.train(output_dir=tmp_path / "with", **options, **prior)
    write_pictures(tmp_path / "class", 2, seed=6)  # others of the same names
    with pytest.raises(OutputError, match="was made with other"):
        emloc.train(output_dir=tmp_path / "with", **options, **prior)


def test_bad_input_is_one_sentence(tiny, tmp_path):
    options = {
        "model_name_or_path": str(tiny.base), "output_dir": tmp_path / "x", "max_train_steps": 1,
        "resolution": RESOLUTION,
    }  # fmt: skip
    pictures = {"instance_data_dir": str(tiny.pictures)}
    with pytest.raises(ConfigError, match="dataset is required"):
        emloc.train(instance_prompt=PROMPT, **options)
    with pytest.raises(DataError, match="caption"):
        emloc.train(**pictures, **options)
    with pytest.raises(ConfigError, match="word of its own"):
        emloc.train(instance_prompt="a photo of a", **pictures, **options)
    with pytest.raises(ConfigError, match="mean the same"):
        emloc.train(instance_prompt=PROMPT, dataset="other", **pictures, **options)
    with pytest.raises(ConfigError, match="multiple of"):
        emloc.train(instance_prompt=PROMPT, **pictures, **{**options, "resolution": 60})
    with pytest.raises(ConfigError, match="instance_prompt is an option of the family diffusion"):
        llm = __import__("emloc_llm.example", fromlist=["write_example"])
        emloc.compress(
            output_dir=tmp_path / "y", instance_prompt="a", **llm.write_example(tmp_path, 0)
        )
    assert not (tmp_path / "x").exists()


def test_validation_pictures_do_not_change_training(tiny, tmp_path):
    options = {
        "model_name_or_path": str(tiny.base), "instance_data_dir": str(tiny.pictures),
        "instance_prompt": PROMPT, "resolution": RESOLUTION, "max_train_steps": 3,
    }  # fmt: skip
    plain = emloc.train(output_dir=tmp_path / "plain", **options)
    drawn = emloc.train(
        output_dir=tmp_path / "drawn", validation_prompt=PROMPT, validation_steps=2,
        num_validation_images=2, num_inference_steps=2, report_to=["tensorboard"], **options,
    )  # fmt: skip
    names = sorted(path.name for path in (drawn / "validation").iterdir())
    assert names == ["step-2-0.png", "step-2-1.png", "step-3-0.png", "step-3-1.png"]
    events = EventAccumulator(str(drawn / "runs" / "validation"), {"images": 0})
    events.Reload()
    [tag] = {name.rpartition("/")[0] or name for name in events.Tags()["images"]}
    assert tag == PROMPT
    steps = [image.step for name in events.Tags()["images"] for image in events.Images(name)]
    assert sorted(set(steps)) == [2, 3]
    first, second = (load_file(f / "adapter_model.safetensors") for f in (plain, drawn))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("kind", ["sd", "flux"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pipelines_in_half_precision_draw_while_training(kind, dtype, tiny, tmp_path):
    """Whatever draws beside the denoiser is loaded in the denoiser's dtype."""
    base = write_pipeline(tmp_path / "base", kind, seed=0, dtype=dtype)
    drawn = emloc.train(
        model_name_or_path=str(base), instance_data_dir=str(tiny.pictures), instance_prompt=PROMPT,
        resolution=RESOLUTION, max_train_steps=1, output_dir=tmp_path / "drawn", validation_prompt=PROMPT,
        num_validation_images=1, num_inference_steps=1,
    )  # fmt: skip
    assert [path.name for path in (drawn / "validation").iterdir()] == ["step-1-0.png"]


def test_what_cannot_be_trained_is_refused_before_anything_is_encoded(tiny, tmp_path):
    options = {
        "model_name_or_path": str(tiny.base), "instance_data_dir": str(tiny.pictures),
        "instance_prompt": PROMPT, "resolution": RESOLUTION,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="validation_prompt is drawn by the whole model"):
        emloc.train(
            output_dir=tmp_path / "x", stream=True, validation_prompt=PROMPT, max_steps=1, **options
        )
    inpainting = write_pipeline(tmp_path / "inpainting", "sd", seed=0, in_channels=9)
    options["model_name_or_path"] = str(inpainting)
    says = "reads 9 channels and predicts 4, so it needs another picture beside the latents"
    for stage, more in (
        (emloc.train, {"output_dir": tmp_path / "x", "max_steps": 1}),
        (emloc.compress, {"output_dir": tmp_path / "x"}),
        (emloc.evaluate, {}),
    ):
        with pytest.raises(ConfigError, match=says):
            stage(**options, **more)
    assert not (tmp_path / "x").exists()


def test_optimisers_go_by_the_names_of_diffusers(tiny, tmp_path):
    options = {
        "model_name_or_path": str(tiny.base), "instance_data_dir": str(tiny.pictures),
        "instance_prompt": PROMPT, "resolution": RESOLUTION, "max_train_steps": 2,
        "learning_rate": 1.0,
    }  # fmt: skip
    ours = emloc.train(output_dir=tmp_path / "a", optim="prodigy", **options)
    theirs = emloc.train(output_dir=tmp_path / "b", optimizer="prodigy", **options)
    name = "adapter_model.safetensors"
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert Manifest.read(theirs).settings["optim"] == "prodigy"

    def refused(match, **more):
        with pytest.raises(ConfigError, match=match):
            emloc.train(output_dir=tmp_path / "x", **{**options, **more})

    refused("adamw_8bit needs a GPU", optimizer="adamw", use_8bit_adam=True)
    refused("for AdamW, not Prodigy", optimizer="prodigy", use_8bit_adam=True)
    refused("contradicts optimizer or use_8bit_adam", optimizer="adamw", optim="prodigy")
    refused("optimizer = 'sgd'", optimizer="sgd")


NAME = "adapter_model.safetensors"


def dreambooth(tiny, tmp_path, name, **more):
    options = {
        "model_name_or_path": str(tiny.base), "instance_data_dir": str(tiny.pictures),
        "instance_prompt": PROMPT, "resolution": RESOLUTION, "max_train_steps": 2,
        "learning_rate": 0.1, "warmup_ratio": 0.0, "optim": "sgd", "max_grad_norm": 1e9,
    }  # fmt: skip
    return emloc.train(output_dir=tmp_path / name, **{**options, **more})


def test_captions_are_trained_with_their_pictures(tiny, tmp_path):
    """name.txt beside name.png: the same captions are the same training, others are another."""
    captioned = {"instance_prompt": None, "instance_data_dir": str(tmp_path / "captioned")}
    shutil.copytree(tiny.pictures, captioned["instance_data_dir"])
    files = sorted((tmp_path / "captioned").glob("*.png"))
    plain = dreambooth(tiny, tmp_path, "plain") / NAME
    for path in files:
        path.with_suffix(".txt").write_text(PROMPT + "\n")
    assert (dreambooth(tiny, tmp_path, "same", **captioned) / NAME).read_bytes() == (
        plain.read_bytes()
    )
    for index, path in enumerate(files):
        path.with_suffix(".txt").write_text(f"sks square number {index}")
    other = dreambooth(tiny, tmp_path, "other", **captioned) / NAME
    assert other.read_bytes() != plain.read_bytes()


@pytest.mark.parametrize("text", [False, True])
def test_accumulated_steps_are_means_of_their_micro_batches(tiny, tmp_path, monkeypatch, text):
    """Two micro-batches give half the sum of their gradients, with text encoders in training too."""
    seen = []
    original = Samples.batch

    def recorded(self, chosen, objective, generator):
        seen.append(original(self, chosen, objective, generator))
        return dict(seen[-1])

    options = {"max_train_steps": 1, "train_text_encoder": text}
    with monkeypatch.context() as patch:
        patch.setattr(Samples, "batch", recorded)
        accumulated = dreambooth(
            tiny, tmp_path, "a", train_batch_size=1, gradient_accumulation_steps=2, **options
        )
    first, second = seen
    joined = {name: torch.cat([tensor, second[name]]) for name, tensor in first.items()}
    with monkeypatch.context() as patch:
        patch.setattr(Samples, "batch", lambda *_: dict(joined))
        whole = dreambooth(tiny, tmp_path, "b", train_batch_size=2, **options)
    ours, theirs = (load_file(folder / NAME) for folder in (accumulated, whole))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-7)
    assert any(bool(tensor.any()) for key, tensor in theirs.items() if "lora_B" in key)


def test_pictures_and_prompts_are_encoded_once(tiny, tmp_path, monkeypatch):
    """However many steps there are; the encoders are gone before the denoiser comes."""
    calls = []

    def counting(name, original):
        def count(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        return count

    for module, name in (
        (samples, "encode_latents"), (PromptEncoder, "encode"), (training, "frozen_model"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    dreambooth(tiny, tmp_path, "a", max_train_steps=3)
    assert calls == ["encode_latents", "encode", "frozen_model"]


def test_everyday_words_and_few_pictures_are_said(tiny, tmp_path, monkeypatch, capsys):
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(next(tiny.pictures.glob("*.png")), one)
    monkeypatch.setattr(prompts, "_is_rare", lambda word, tokenizer: len(tokenizer) < 100)
    dreambooth(tiny, tmp_path, "a", max_train_steps=1, instance_data_dir=str(one))
    said = " ".join(capsys.readouterr().err.split())
    assert "everyday ones, whose meaning training will change" in said
    assert "has only 1 picture" in said


def test_unusable_pictures_are_one_sentence(tiny, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(tiny.pictures, folder)
    (folder / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.png: the picture cannot be read"):
        dreambooth(tiny, tmp_path, "a", instance_data_dir=str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is empty; put pictures into it"):
        dreambooth(tiny, tmp_path, "a", instance_data_dir=str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="class_data_dir is set without class_prompt"):
        dreambooth(tiny, tmp_path, "a", class_data_dir=str(tiny.pictures))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("subject", "of_class"), [(2, 5), (3, 2)])
def test_all_pictures_of_the_class_preserve_the_prior(
    tiny, tmp_path, monkeypatch, subject, of_class
):
    """An epoch goes through the longer of the two lists, as diffusers' does."""
    drawn = []
    original = Samples.batch

    def noted(self, chosen, *rest):
        drawn.extend(self.pictures[i].path.parent.name + self.pictures[i].path.stem for i in chosen)
        return original(self, chosen, *rest)

    monkeypatch.setattr(Samples, "batch", noted)
    adapter = emloc.train(
        model_name_or_path=str(tiny.base), output_dir=tmp_path / "a", resolution=RESOLUTION,
        instance_data_dir=str(write_pictures(tmp_path / "subject", subject, seed=1)),
        class_data_dir=str(write_pictures(tmp_path / "class", of_class, seed=5)),
        instance_prompt=PROMPT, class_prompt="a photo of square", num_train_epochs=1,
        train_batch_size=1,
    )  # fmt: skip
    assert len(set(drawn)) == subject + of_class
    assert Manifest.read(adapter).summary["steps"] == max(subject, of_class)


def test_convolutions_beside_names_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="lora_conv=true adds convolutions to all-linear"):
        dreambooth(tiny, tmp_path, "a", lora_conv=True, lora_target_modules="to_q,to_k")


def test_a_denoiser_in_bfloat16_is_told_the_step_that_was_drawn(tiny, monkeypatch):
    """bfloat16 has no 981; diffusers embeds steps in single precision."""
    from emloc_diffusion.denoising_loss import squared_errors
    from emloc_diffusion.loading import load_denoiser

    checkpoint = Checkpoint.open(str(tiny.base))
    model = load_denoiser(checkpoint, "bfloat16", "cpu")
    told = []
    model.time_proj.register_forward_hook(lambda _, given, __: told.append(given[0]))
    width = model.config.cross_attention_dim
    batch = {
        "sample": torch.randn(2, model.config.in_channels, 8, 8), "target": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([981.0, 522.0]), "encoder_hidden_states": torch.randn(2, 7, width),
    }  # fmt: skip
    squared_errors(model, batch)
    assert told[0].tolist() == [981.0, 522.0]
