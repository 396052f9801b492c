"""Vision-language models through the stages, against dense float64 and stock loaders."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_internvl_chat import IMAGE_TOKEN_ID, chat_config, original_tensors, write
from vlm_reference import best_error, load, logits, outputs_and_inputs

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.config import CompressConfig
from emloc.errors import ConfigError, MismatchError
from emloc.extend.plugin_options import with_plugin_options
from emloc_vlm.example import write_model
from emloc_vlm.family import VLMFamily
from emloc_vlm.parts import part_of
from emloc_vlm.processor import load_processor

VISION_6B = {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False}


def batches_of(model, options):
    config = with_plugin_options(CompressConfig)(
        model_name_or_path=str(model), output_dir="unused", **options
    )
    return VLMFamily().calibration_batches(Checkpoint.open(model), config)


@pytest.mark.parametrize(
    ("text_type", "vision", "dtype", "shard"),
    [
        ("qwen2", None, torch.float32, "1GB"),
        ("llama", VISION_6B, torch.bfloat16, "40KB"),
        ("qwen3", VISION_6B, torch.float32, "40KB"),
    ],
)
def test_both_towers_are_the_optimum(tiny, tmp_path, text_type, vision, dtype, shard):
    """Every layer of both towers, against the singular values of its own outputs."""
    base = write_model(
        tmp_path / "base", text_type, dtype, seed=3, max_shard_size=shard, vision=vision
    )
    emulator = emloc.compress(
        model_name_or_path=str(base), output_dir=tmp_path / "e", format="low_rank", keep_ratio=0.5,
        calibration_batch_size=4, share_factors=False, **tiny.common,
    )  # fmt: skip
    layers = Manifest.read(emulator).layers
    assert {part_of(name) for name in layers} == {"vision", "language"}
    model = load(base)
    seen = outputs_and_inputs(model, batches_of(base, tiny.common), layers)
    compressed = load(emulator)
    for name, entry in layers.items():
        assert entry["tokens"] == len(seen[name])
        weight = model.get_submodule(name).weight
        low = compressed.get_submodule(name)
        error = ((weight - low.weight).double() @ seen[name].T).norm()
        best = best_error(weight, seen[name], entry["rank"])
        slack = 1.0001 if dtype == torch.float32 else 1.05  # factors are rounded to bfloat16
        assert error <= best * slack + 1e-4 * (weight.double() @ seen[name].T).norm()


def test_full_rank_is_the_base(tiny, tmp_path):
    ranks = {".*": 1000}
    emulator = emloc.compress(
        model_name_or_path=str(tiny.base), output_dir=tmp_path / "e", format="low_rank",
        rank_pattern=ranks,
        **tiny.common,
    )  # fmt: skip
    [batch, *_] = batches_of(tiny.base, tiny.common)
    torch.testing.assert_close(
        logits(load(emulator), batch), logits(load(tiny.base), batch), rtol=1e-3, atol=1e-3
    )


def test_images_of_differing_tile_counts_in_one_micro_batch(tiny):
    batches = batches_of(tiny.base, {**tiny.common, "calibration_batch_size": 8})
    token = load_processor(tiny.base).image_token_id
    tiles = [(batch["input_ids"] == token).sum(1) // 4 for batch in batches]
    assert any(len(counts.unique()) > 1 for counts in tiles)
    for counts, batch in zip(tiles, batches):
        assert int(counts.sum()) == len(batch["pixel_values"])
    one = batches_of(tiny.base, {**tiny.common, "max_dynamic_patch": 1})
    assert sum(len(b["pixel_values"]) for b in one) == 24


def test_the_corrected_adapter_in_stock_peft(tiny):
    """No key is missing or left over, and the sum acts as the emulator did on what A reads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*|.*unexpected.*")
        tuned = PeftModel.from_pretrained(load(tiny.base), tiny.corrected)
        on_emulator = PeftModel.from_pretrained(load(tiny.emulator), tiny.adapter)
    stored = load_file(tiny.corrected / "adapter_model.safetensors")
    held = {n.replace(".default", "") for n, _ in tuned.named_parameters() if "lora_" in n}
    assert held == stored.keys()
    compared = 0
    for name, module in tuned.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        other = on_emulator.get_submodule(name)
        a, s = module.lora_A["default"].weight, module.scaling["default"]
        ours = module.base_layer.weight + s * module.lora_B["default"].weight @ a
        theirs = other.base_layer.weight + s * other.lora_B["default"].weight @ a
        torch.testing.assert_close(ours @ a.T, theirs @ a.T, rtol=1e-3, atol=1e-3)
        compared += 1
    assert compared == 21
    assert all(part_of(key) == "language" for key in stored)


def test_merged_loads_with_stock_transformers(tiny, tmp_path):
    merged = emloc.merge(adapter=str(tiny.corrected), output_dir=tmp_path / "m")
    [batch, *_] = batches_of(tiny.base, tiny.common)
    tuned = PeftModel.from_pretrained(load(tiny.base), tiny.corrected)
    torch.testing.assert_close(
        logits(load(merged), batch), logits(tuned, batch), rtol=1e-4, atol=1e-4
    )
    assert load_processor(merged).image_seq_length == 4


def test_an_adapter_of_another_model_is_refused(tiny, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (broken / file).write_bytes((tiny.corrected / file).read_bytes())
    tensors = load_file(broken / "adapter_model.safetensors")
    renamed = {k.replace("language_model", "language_models"): v for k, v in tensors.items()}
    save_file(renamed, broken / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match="language_models"):
        emloc.evaluate(
            model_name_or_path=str(tiny.base), adapter=str(broken), dataset=str(tiny.test),
            max_length=96,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, {"language"}),
        ({"freeze_vision_tower": False}, {"language", "vision"}),
        ({"freeze_multi_modal_projector": False, "freeze_language_model": True}, {"projector"}),
        ({"lora_target_modules": ["q_proj"], "freeze_vision_tower": False}, {"language", "vision"}),
        ({"lora_target_modules": ["q_proj"]}, {"language"}),
    ],
)
def test_parts_that_are_frozen_get_no_lora(tiny, tmp_path, options, parts):
    folder = emloc.train(
        output_dir=tmp_path / "a", **{**tiny.train_options, "max_steps": 1, **options}
    )
    keys = load_file(folder / "adapter_model.safetensors")
    assert {part_of(key) for key in keys} == parts
    corrected = emloc.correct(
        adapter=str(folder), emulator=str(tiny.emulator), output_dir=tmp_path / "c", limit="none",
        **tiny.common,
    )  # fmt: skip
    if parts == {"projector"}:  # it is not compressed, so there is nothing to correct
        after = load_file(corrected / "adapter_model.safetensors")
        assert all(torch.equal(after[key], tensor) for key, tensor in keys.items())


def test_freezing_everything_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="frozen"):
        emloc.train(
            output_dir=tmp_path / "a", **{**tiny.train_options, "freeze_language_model": True}
        )


def test_training_resumes_exactly(tiny, tmp_path, monkeypatch):
    from emloc.integrations.transformers import lora_training

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lora_training, "plot_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            emloc.train(output_dir=tmp_path / "a", **tiny.train_options)
    again = emloc.train(output_dir=tmp_path / "a", **tiny.train_options)
    ours = load_file(again / "adapter_model.safetensors")
    for name, tensor in load_file(tiny.adapter / "adapter_model.safetensors").items():
        assert torch.equal(ours[name], tensor)


def test_killed_after_its_last_step_it_writes_the_same_tokenizer(tiny, tmp_path, monkeypatch):
    """Padding a batch leaves its mark on a tokenizer, and the run that goes on pads none."""
    options = {**tiny.train_options, "max_steps": 2, "save_steps": 1}
    whole = emloc.train(output_dir=tmp_path / "whole", **options)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("emloc.integrations.transformers.lora_training.plot_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            emloc.train(output_dir=tmp_path / "cut", **options)
    cut = emloc.train(output_dir=tmp_path / "cut", **options)
    assert (cut / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    assert json.loads((cut / "tokenizer.json").read_text())["padding"] is None


def test_the_same_bytes_twice(tiny, tmp_path):
    again = emloc.compress(
        model_name_or_path=str(tiny.base), output_dir=tmp_path / "e", format="low_rank", keep_ratio=0.5,
        **tiny.common,
    )  # fmt: skip
    assert Manifest.read(again).files == Manifest.read(tiny.emulator).files


def test_options_of_images_are_refused_for_text(tmp_path):
    from emloc.extend.plugins import load_plugins

    llm = load_plugins().families["llm"].load()
    example = dict(llm.write_example(tmp_path, seed=0))
    with pytest.raises(ConfigError, match="max_dynamic_patch is an option of the family vlm"):
        emloc.compress(output_dir=tmp_path / "e", max_dynamic_patch=2, **example)


@pytest.mark.parametrize("language", ["internlm2", "qwen2"])
def test_opengvlab_layout_through_all_stages(tiny, tmp_path, language):
    """The original layout gives what the native one gives, to the last bit."""
    text = "llama" if language == "internlm2" else "qwen2"
    size = {"hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 6,
            "num_key_value_heads": 2, "head_dim": 4, "num_hidden_layers": 2, "rms_norm_eps": 1e-5,
            "rope_theta": 5000.0}  # fmt: skip
    native = write_model(tmp_path / "native", text, seed=5, text=size,
                         vision={"num_attention_heads": 5})  # fmt: skip
    config = json.loads((native / "config.json").read_text())
    state = dict(load(native).state_dict())
    original = tmp_path / "original"
    llm = {**config["text_config"], "model_type": language, "bias": False, "rope_theta": 5000.0}
    about = chat_config(language)
    about |= {
        "llm_config": llm,
        "force_image_size": 16,
        "max_dynamic_patch": 3,
        "torch_dtype": "float32",
    }
    about["vision_config"] |= {
        "hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 5,
        "num_hidden_layers": 2, "image_size": 16, "patch_size": 4,
        "norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True,
    }  # fmt: skip
    assert IMAGE_TOKEN_ID
    write(original, about, original_tensors(state, language == "internlm2"))
    images = load_processor(native).image_processor
    normalised = {"image_mean": images.image_mean, "image_std": images.image_std}
    (original / "preprocessor_config.json").write_text(json.dumps(normalised))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (original / file).write_bytes((native / file).read_bytes())
    made = {}
    for name, base in (("native", native), ("original", original)):
        emulator = emloc.compress(
            model_name_or_path=str(base), output_dir=tmp_path / f"{name}-e", format="low_rank",
            keep_ratio=0.6, **tiny.common,
        )  # fmt: skip
        adapter = emloc.train(
            output_dir=tmp_path / f"{name}-a", max_steps=2, lora_r=3, learning_rate=1e-2,
            emulator=str(emulator), **tiny.common,
        )  # fmt: skip
        corrected = emloc.correct(
            adapter=str(adapter), emulator=str(emulator), output_dir=tmp_path / f"{name}-c",
            limit=1, **tiny.common,
        )  # fmt: skip
        merged = emloc.merge(adapter=str(corrected), output_dir=tmp_path / f"{name}-m")
        made[name] = (emulator, corrected, merged)
        assert emloc.verify(path=merged)["kind"] == "merged_model"
        assert emloc.verify(path=emulator)["kind"] == "emulator"
    ours, theirs = (load(made[name][2]).state_dict() for name in ("original", "native"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
    scores = [
        emloc.evaluate(
            model_name_or_path=str(model), adapter=adapter, dataset=str(tiny.test), max_length=96,
            max_new_tokens=0,
        )["loss"]
        for model, adapter in ((original, str(made["original"][1])), (made["original"][2], None))
    ]  # fmt: skip
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_calibration_until_there_are_so_many_tokens(tiny):
    options = {**tiny.common, "num_calibration_tokens": 150, "calibration_batch_size": 1}
    lengths = [int(batch["attention_mask"].sum()) for batch in batches_of(tiny.base, options)]
    assert sum(lengths[:-1]) < 150 <= sum(lengths)


def test_shares_evaluation_while_training_and_eva(tiny, tmp_path):
    """Options that the families share hold for images too."""
    folder = emloc.train(
        output_dir=tmp_path / "a",
        **{
            **tiny.train_options, "dataset": f"{tiny.data},{tiny.test}", "dataset_weights": [3, 1],
            "eval_dataset": str(tiny.test), "eval_steps": 2, "lora_init": "eva",
        },
    )  # fmt: skip
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 4]
    found = load_file(folder / "adapter_model.safetensors")
    ranks = {tensor.shape[0] for key, tensor in found.items() if "lora_A" in key}
    assert len(ranks) > 1  # EVA hands ranks to where the activations vary most


def test_an_answer_that_is_cut_is_said(tiny, capsys):
    """The prompt must fit; what the answer loses is said."""
    whole = batches_of(tiny.base, {**tiny.common, "calibration_batch_size": 24})[0]
    longest = int(whole["attention_mask"].sum(1).max())
    options = {**tiny.common, "calibration_batch_size": 24, "max_length": longest - 1}
    cut = batches_of(tiny.base, options)[0]
    assert cut["input_ids"].shape[1] == longest - 1
    assert f"its answer is cut at max_length={longest - 1}" in " ".join(
        capsys.readouterr().err.split()
    )


def test_generation_stops_where_the_chat_closes_an_answer(tiny):
    """Even if the model's own configuration names another end."""
    from emloc_vlm.encode import end_tokens
    from emloc_vlm.rows import load_examples

    options = with_plugin_options(CompressConfig)(
        model_name_or_path=str(tiny.base), output_dir="unused", **tiny.common
    )
    processor = load_processor(tiny.base)
    examples = load_examples(options, str(tiny.data))
    ends = {processor.tokenizer.decode(token) for token in end_tokens(examples, processor, options)}
    assert ends == {"<|im_end|>"}
