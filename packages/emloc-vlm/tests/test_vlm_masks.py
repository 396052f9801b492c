"""Patches and text tokens that are real, answers' ends, and the loss, on padded micro-batches."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from vlm_reference import load

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.config import CompressConfig
from emloc.errors import ConfigError, NumericalError
from emloc.extend.losses import loss_sum
from emloc.extend.plugin_options import with_plugin_options
from emloc.streaming.real_rows import real_rows
from emloc_vlm.calibration import PATCH_MASK, _with_patch_mask
from emloc_vlm.family import VLMFamily
from emloc_vlm.parts import part_of


def batches_of(base, **options):
    config = with_plugin_options(CompressConfig)(
        model_name_or_path=str(base), output_dir="unused", **options
    )
    return VLMFamily().calibration_batches(Checkpoint.open(base), config)


def test_both_towers_fold_what_is_real(tiny, tmp_path):
    """Vision tokens are all real where images are not padded; of text, padding is left out."""
    options = {**tiny.common, "calibration_batch_size": 5}
    folder = emloc.compress(
        model_name_or_path=str(tiny.base), output_dir=tmp_path / "e", format="low_rank", keep_ratio=0.5,
        share_factors=False, **options,
    )  # fmt: skip
    batches = batches_of(tiny.base, **options)
    assert any(not bool(batch["attention_mask"].all()) for batch in batches)
    text = sum(int(batch["attention_mask"].sum()) for batch in batches)
    model, seen = load(tiny.base), {}
    for name in Manifest.read(folder).layers:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: seen.__setitem__(
                name, seen.get(name, 0) + x[0].numel() // x[0].shape[-1]
            )
        )
    with torch.no_grad():
        for batch in batches:
            model(**{k: v for k, v in batch.items() if k != "labels"})
    for name, entry in Manifest.read(folder).layers.items():
        assert entry["tokens"] == (seen[name] if part_of(name) == "vision" else text), name


@pytest.mark.parametrize("name", ["pixel_attention_mask", "pixel_mask"])
def test_a_patch_is_real_if_a_pixel_of_it_is(name):
    pixels = torch.zeros(2, 8, 12, dtype=torch.long)
    pixels[0], pixels[1, :8, :5] = 1, 1
    mask = _with_patch_mask({name: pixels}, 4)[PATCH_MASK]
    assert mask.tolist() == [[[True] * 3] * 2, [[True, True, False]] * 2]


def test_masks_of_patches_are_taken_as_they_are():
    """Processors that cut images themselves mask patches, not pixels."""
    patches = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    mask = _with_patch_mask({"pixel_attention_mask": patches}, 16)[PATCH_MASK]
    assert torch.equal(mask, patches.bool())
    assert PATCH_MASK not in _with_patch_mask({"pixel_attention_mask": patches * 0 + 1}, 16)


def test_the_mask_is_that_of_what_is_read():
    patches = torch.tensor([[[True, False]]])
    text = torch.tensor([[1, 1, 0]])
    batch = {PATCH_MASK: patches, "attention_mask": text}
    found = VLMFamily().token_mask
    assert found(batch, "model.vision_tower.layers.1.q") is patches
    assert found(batch, "model.vision_tower.layers.1") is patches
    assert found(batch, "model.language_model.layers.1.q").tolist() == [[True, True, False]]
    # A projector that makes four tokens of every image does not fit the mask of two patches.
    mask = found(batch, "model.connector.perceiver_resampler.layers.0.q_proj")
    with pytest.raises(ConfigError, match="calibration_batch_size=1"):
        real_rows(torch.ones(1, 4, 3), mask, "Layer q_proj")
    assert found({"attention_mask": text}, "model.visual.merger.mlp.0") is None


def test_the_loss_is_transformers_own(tiny):
    model = load(tiny.base)
    for batch in batches_of(tiny.base, **tiny.common, calibration_batch_size=5):
        with torch.no_grad():
            ours, stock = loss_sum(VLMFamily(), model, batch), float(model(**batch).loss)
        assert ours.mean("it") == pytest.approx(stock, rel=1e-6, abs=1e-6)


def test_answers_do_not_follow_generation_config(tiny, tmp_path):
    base = shutil.copytree(tiny.base, tmp_path / "base")
    path = base / "generation_config.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    changed = {"no_repeat_ngram_size": 1, "min_new_tokens": 5, "repetition_penalty": 9.0}
    options = {"dataset": str(tiny.test), "max_length": 96, "max_new_tokens": 6, "num_answers": 3}
    expected = emloc.evaluate(model_name_or_path=str(base), **options)["answers"]
    path.write_text(json.dumps({**content, **changed}))
    assert emloc.evaluate(model_name_or_path=str(base), **options)["answers"] == expected


def test_a_model_that_computes_nan_has_no_score(tiny, tmp_path):
    base = shutil.copytree(tiny.base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.0.mlp.down_proj.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="the loss is nan"):
        emloc.evaluate(model_name_or_path=str(base), dataset=str(tiny.test), max_length=96)
