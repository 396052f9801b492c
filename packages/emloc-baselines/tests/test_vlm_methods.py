"""All methods on an InternVL: the language model of each, both towers where the paper prunes both."""

from contextlib import contextmanager

import pytest
import torch
from pruning_reference import gradients, indices, load_vlm
from safetensors.torch import load_file

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.config import CompressConfig
from emloc.extend.methods import Task
from emloc.extend.opening import open_model
from emloc.extend.plugin_options import with_plugin_options
from emloc.extend.plugins import method_named
from emloc.streaming.block_gradients import backward_by_block
from emloc.streaming.stream import UnitStream
from emloc_vlm.example import write_model, write_rows

OWN = {
    "lora": {},
    "qlora": {},
    "loram-rand": {"protected_first": 1, "protected_last": 0},
    "loram-stru": {"protected_first": 1, "protected_last": 0},
    "offsite-tuning": {"trained_blocks": 1},
    "upop": {"search_steps": 2},
}
VISION = {"use_qk_norm": True, "norm_type": "rms_norm", "layer_scale_init_value": 1.0}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """An InternVL whose towers both normalise queries and keys, as the largest do; its data."""
    root = tmp_path_factory.mktemp("vlm")
    base = write_model(root / "base", "qwen3", vision=VISION, text={"num_hidden_layers": 4})
    return base, write_rows(root / "train.jsonl", 8, seed=0)


def task_of(vlm, name, keep_ratio=0.85):
    base, data = vlm
    common = {"dataset": str(data), "max_length": 96}
    train = {**common, "max_steps": 2, "lora_r": 3, "learning_rate": 1e-2, "logging_steps": 1,
             "per_device_train_batch_size": 4}  # fmt: skip
    compress = {
        **common,
        "format": "low_rank",
        "num_calibration_samples": 4,
        "calibration_batch_size": 2,
    }
    return Task(str(base), keep_ratio, 0, compress, train, {}, OWN[name])


@pytest.fixture(scope="module", params=sorted(set(OWN) - {"lora"}))
def made(request, vlm, tmp_path_factory):
    """Name, light model, adapter and recovered adapter of a method."""
    root, name = tmp_path_factory.mktemp(request.param), request.param
    task, method = task_of(vlm, name), method_named(name).load()
    light = method.build(task, root / "light")
    adapter = method.train(task, light, root / "adapter")
    return name, light, adapter, method.recover(task, light, adapter, root / "recovered")


def test_gradients_reach_through_both_towers(vlm):
    base, _ = vlm
    checkpoint, family = open_model(str(base))
    options = with_plugin_options(CompressConfig)(
        model_name_or_path=str(base), output_dir="x", **task_of(vlm, "lora").compress
    )
    batches = family.calibration_batches(checkpoint, options)
    stream = UnitStream(family, checkpoint)
    found = {}

    @contextmanager
    def visit(block, module):
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        yield
        found.update({f"{block}.{n}": p.grad.clone() for n, p in module.named_parameters()})

    backward_by_block(stream, batches, visit)
    expected = gradients(load_vlm(base), batches)
    towers = {"vision" if "vision" in name else "language" for name in found}
    assert towers == {"vision", "language"}
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-3), name
        assert gradient.any(), name


def test_a_lora_of_the_original_comes_out(made, vlm):
    name, light, adapter, recovered = made
    base, data = vlm
    assert Manifest.read(light).method == Manifest.read(adapter).method == name
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(recovered / "adapter_model.safetensors")
    assert len(before) == len(after)
    assert all("language_model" in key for key in after)
    assert emloc.verify(path=recovered)["base_model"] == str(base)
    scored = {"dataset": str(data), "max_length": 96, "max_new_tokens": 2}
    plain = emloc.evaluate(model_name_or_path=str(base), **scored)["loss"]
    tuned = emloc.evaluate(model_name_or_path=str(base), adapter=str(recovered), **scored)["loss"]
    assert tuned != plain


def test_the_light_model_holds_less(made, vlm):
    name, light, adapter, _ = made
    summary = Manifest.read(adapter).summary
    held = summary["train_weight_bytes"] - summary["trainable_bytes"]
    whole = sum(p.numel() * 4 for p in load_vlm(vlm[0]).parameters())
    assert held < whole
    if name != "qlora":
        assert held <= Manifest.read(light).summary["budget_bytes"]


def test_what_is_pruned_where(vlm, tmp_path):
    kept = {
        name: Manifest.read(method_named(name).load().build(task_of(vlm, name), tmp_path / name))
        for name in ("loram-stru", "upop", "offsite-tuning")
    }
    assert all("language_model" in block for block in kept["loram-stru"].layers)
    assert len(kept["loram-stru"].layers) == 3
    towers = {"vision" if "vision" in b else "language" for b in kept["upop"].layers}
    assert towers == {"vision", "language"}
    assert 3 <= len(kept["offsite-tuning"].layers) < 4 + 1
    # In the vision tower dimensions go one by one, in the language model in pairs.
    for block, entry in kept["upop"].layers.items():
        dims = set(indices(entry["kept"]["dims"]))
        if "language" in block:
            assert {d + 8 for d in dims if d < 8} == {d for d in dims if d >= 8}


def test_a_sliced_model_computes_what_the_masked_one_does_in_both_towers(vlm, tmp_path):
    base, _ = vlm
    task = task_of(vlm, "upop", keep_ratio=0.5)
    light = method_named("upop").load().build(task, tmp_path / "light")
    masked, whole = load_vlm(base), load_vlm(base)
    shrunk = 0
    for block, entry in Manifest.read(light).layers.items():
        dims, neurons = (indices(entry["kept"][name]) for name in ("dims", "neurons"))
        module = masked.get_submodule(block)
        attention = module.attention if "vision" in block else module.self_attn
        mlp_input = module.mlp.fc1 if "vision" in block else module.mlp.up_proj
        head = torch.zeros(attention.head_dim)
        head[dims] = 1
        shrunk += len(dims) < attention.head_dim
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            layer.register_forward_hook(
                lambda m, x, out, head=head: out * head.repeat(out.shape[-1] // len(head))
            )
        mask = torch.zeros(mlp_input.out_features)
        mask[neurons] = 1
        mlp_input.register_forward_hook(lambda m, x, out, mask=mask: out * mask)
    assert shrunk
    checkpoint, family = open_model(str(base))
    options = with_plugin_options(CompressConfig)(
        model_name_or_path=str(base), output_dir="x", **task.compress
    )
    batch = family.calibration_batches(checkpoint, options)[0]
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "emloc_patch_mask")}
    with torch.no_grad():
        expected, found, plain = (
            model(**inputs).logits for model in (masked, load_vlm(light), whole)
        )
    assert torch.allclose(found, expected, atol=2e-4)
    assert (found - plain).abs().max() > 0.1
