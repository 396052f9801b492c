"""LoRAM against direct constructions: gradients, criterion, sizes, the pruned model, the way back."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from pruning_reference import gradients, indices, load, zero_outside
from safetensors.torch import load_file

import emloc
import emloc_baselines
from emloc.artefacts.manifest import Manifest
from emloc.config import CompressConfig
from emloc.errors import ConfigError, MismatchError
from emloc.extend.methods import Task
from emloc.extend.opening import open_model
from emloc.extend.plugin_options import with_plugin_options
from emloc.streaming.block_gradients import backward_by_block
from emloc.streaming.stream import UnitStream
from emloc_baselines.budget import emulator_bytes, held_bytes
from emloc_baselines.importance import first_order
from emloc_baselines.kept import as_text, from_text
from emloc_baselines.light import Source
from emloc_baselines.lora import Lora
from emloc_baselines.loram import LoramRand, LoramStru
from emloc_baselines.pruning import fit, prices
from emloc_baselines.structures import find_structures
from emloc_llm.example import write_model

KINDS = {
    "llama": {},
    "qwen2": {},  # biases on q, k and v
    "qwen3": {"head_dim": 24},  # norms of queries and keys; heads wider than the hidden size
}
SHAPE = {"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3}
OWN = {"protected_first": 1, "protected_last": 1}


@pytest.fixture(scope="module", params=sorted(KINDS))
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "base"
    return write_model(folder, request.param, **{**SHAPE, **KINDS[request.param]})


def task_of(base, data, keep_ratio=0.75, seed=0, options=OWN, **train):
    common = {"dataset": str(data), "max_length": 96}
    training = {**common, "max_steps": 3, "lora_r": 3, "lora_alpha": 12, "learning_rate": 1e-2,
                "logging_steps": 1, **train}  # fmt: skip
    compress = {
        **common,
        "format": "low_rank",
        "num_calibration_samples": 8,
        "calibration_batch_size": 3,
    }
    return Task(str(base), keep_ratio, seed, compress, training, {}, options)


def source_of(task):
    base, family = open_model(task.model_name_or_path)
    config = with_plugin_options(CompressConfig)(
        model_name_or_path=task.model_name_or_path, output_dir="unused",
        keep_ratio=task.keep_ratio, seed=task.seed, **task.compress,
    )  # fmt: skip
    return Source(base, family, config, family.calibration_batches(base, config))


@pytest.fixture(scope="module")
def made(base, tiny, tmp_path_factory):
    """Light model, adapter and recovered adapter of LoRAM-STRU."""
    root, task, method = tmp_path_factory.mktemp("stru"), task_of(base, tiny.data), LoramStru()
    light = method.build(task, root / "light")
    adapter = method.train(task, light, root / "adapter")
    return base, task, light, adapter, method.recover(task, light, adapter, root / "recovered")


def test_gradients_by_block_are_those_of_the_whole_model(base, tiny):
    source = source_of(task_of(base, tiny.data))
    stream = UnitStream(source.family, source.base)
    found = {}

    @contextmanager
    def visit(block, module):
        for parameter in module.parameters():
            assert parameter.device.type == "cpu"
            parameter.requires_grad_(True)
        yield
        found.update({f"{block}.{n}": p.grad.clone() for n, p in module.named_parameters()})

    loss = backward_by_block(stream, source.batches, visit)
    model = load(base)
    expected = gradients(model, source.batches)
    assert len(source.batches) == 3
    assert set(found) == {name for name in expected if ".layers." in name}
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-4), name
        assert gradient.abs().max() > 1e-3, name
    labels = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in source.batches)
    assert labels > 0
    assert 0 < loss < 20
    # Nothing of the model stays behind, and no hook.
    assert all(parameter.device.type == "meta" for parameter in stream.model.get_submodule(
        stream.blocks[0]).parameters())  # fmt: skip
    assert not any(module._forward_hooks for module in stream.model.get_submodule(
        stream.blocks[0]).modules())  # fmt: skip


def test_a_bfloat16_checkpoint_has_bfloat16_products_and_float32_gradients(base, tiny, tmp_path):
    shutil.copytree(base, tmp_path / "half")
    half = load(base).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    source = source_of(task_of(tmp_path / "half", tiny.data))
    stream = UnitStream(source.family, source.base)
    found, products = {}, set()

    @contextmanager
    def visit(block, module):
        handle = module.mlp.down_proj.register_forward_hook(lambda *x: products.add(x[2].dtype))
        module.requires_grad_(True)
        yield
        handle.remove()
        found.update({f"{block}.{n}": p.grad.clone() for n, p in module.named_parameters()})

    backward_by_block(stream, source.batches, visit)
    assert products == {torch.bfloat16}
    expected = gradients(half.float(), source.batches)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        cosine = torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.99, name


def test_importance_is_the_sum_over_coupled_weights(base, tiny):
    source = source_of(task_of(base, tiny.data))
    stream = UnitStream(source.family, source.base)
    structures = find_structures(stream.model, stream.blocks)
    scores = first_order(stream, source.batches, structures)
    model = load(base)
    grads = gradients(model, source.batches)
    product = {n: (p * grads[n]).detach().abs() for n, p in model.named_parameters() if n in grads}
    head = model.config.head_dim
    for index in range(4):
        block = f"model.layers.{index}"
        attn, mlp = f"{block}.self_attn", f"{block}.mlp"
        for group in range(3):
            keys, queries = (
                slice(group * width, (group + 1) * width) for width in (head, 2 * head)
            )
            expected = product[f"{attn}.o_proj.weight"][:, queries].sum()
            expected += product[f"{attn}.q_proj.weight"][queries].sum()
            for name in ("k_proj", "v_proj"):
                expected += product[f"{attn}.{name}.weight"][keys].sum()
                if f"{attn}.{name}.bias" in product:
                    expected += product[f"{attn}.{name}.bias"][keys].sum()
            if f"{attn}.q_proj.bias" in product:
                expected += product[f"{attn}.q_proj.bias"][queries].sum()
            assert float(scores[block].groups[group]) == pytest.approx(float(expected), rel=1e-3)
        neurons = product[f"{mlp}.down_proj.weight"].sum(0)
        neurons = neurons + product[f"{mlp}.gate_proj.weight"].sum(1)
        neurons = neurons + product[f"{mlp}.up_proj.weight"].sum(1)
        assert torch.allclose(scores[block].neurons, neurons, rtol=1e-3)


def test_the_least_important_go(made):
    _, task, light, *_ = made
    source = source_of(task)
    stream = UnitStream(source.family, source.base)
    structures = find_structures(stream.model, stream.blocks[1:3])
    scores = first_order(stream, source.batches, structures)
    for block, entry in Manifest.read(light).layers.items():
        for what in ("groups", "neurons"):
            kept = set(indices(entry["kept"][what]))
            values = getattr(scores[block], what)
            out = [float(v) for i, v in enumerate(values) if i not in kept]
            assert out, what
            assert max(out) <= min(float(values[i]) for i in kept)
    assert sorted(Manifest.read(light).layers) == ["model.layers.1", "model.layers.2"]


def test_a_pruned_model_computes_what_the_masked_one_does(made):
    base, _, light, *_ = made
    masked = load(base)
    head = masked.config.head_dim
    for block, entry in Manifest.read(light).layers.items():
        kept = {name: indices(text) for name, text in entry["kept"].items()}
        keys = [g * head + d for g in kept["groups"] for d in range(head)]
        queries = [h * head + d for g in kept["groups"] for h in (2 * g, 2 * g + 1)
                   for d in range(head)]  # fmt: skip
        attn, mlp = (masked.get_submodule(f"{block}.{name}") for name in ("self_attn", "mlp"))
        with torch.no_grad():
            attn.v_proj.weight.copy_(zero_outside(attn.v_proj.weight, keys))
            if attn.v_proj.bias is not None:
                attn.v_proj.bias.copy_(zero_outside(attn.v_proj.bias, keys))
            attn.o_proj.weight.copy_(zero_outside(attn.o_proj.weight, columns=queries))
            mlp.down_proj.weight.copy_(zero_outside(mlp.down_proj.weight, columns=kept["neurons"]))
    pruned = load(light)
    ids = torch.randint(3, 250, (2, 11))
    with torch.no_grad():
        expected, found = (model(input_ids=ids).logits for model in (masked, pruned))
        whole = load(base)(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert (found - whole).abs().max() > 0.1
    assert pruned.get_submodule("model.layers.0.mlp.up_proj").out_features == 80
    assert pruned.get_submodule("model.layers.1.mlp.up_proj").out_features < 80


def test_it_generates_with_a_cache(made):
    _, _, light, *_ = made
    model = load(light)
    ids = torch.randint(3, 250, (1, 7))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        cached = model.generate(ids, **options)
        plain = model.generate(ids, use_cache=False, **options)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("keep_ratio", [0.7, 0.85, 1.0])
def test_the_budget_is_met_from_below_within_one_neuron(base, tiny, keep_ratio, tmp_path):
    task = task_of(base, tiny.data, keep_ratio)
    source = source_of(task)
    stream = UnitStream(source.family, source.base)
    total, target = held_bytes(stream), emulator_bytes(source, stream)
    assert total == sum(p.numel() * 4 for p in load(base).parameters())
    structures = find_structures(stream.model, stream.blocks[1:3])
    sizes = fit(structures, [prices(stream, s) for s in structures], total - target)
    light = LoramRand().build(task, tmp_path / "light")
    held = sum(p.numel() * 4 for p in load(light).parameters())
    neuron = 3 * 48 * 4
    assert target - neuron < held <= target
    manifest = Manifest.read(light)
    assert manifest.summary["emulator_bytes"] == held
    assert manifest.summary["budget_bytes"] == target
    for size, entry in zip(sizes, manifest.layers.values()):
        assert len(indices(entry["kept"]["neurons"])) == size.neurons
        assert len(indices(entry["kept"]["groups"])) == size.groups


def test_the_budget_is_what_emloc_holds(base, tiny, tmp_path):
    task = task_of(base, tiny.data, 0.4)
    source = source_of(task)
    emulator = emloc.compress(
        model_name_or_path=str(base),
        output_dir=tmp_path / "e",
        keep_ratio=0.4,
        **task.compress,
    )
    emloc_baselines  # noqa: B018 (imports the formats)
    held = sum(p.numel() * 4 for p in load(emulator).parameters())
    assert emulator_bytes(source, UnitStream(source.family, source.base)) == held


def test_the_recovered_adapter_is_scattered_by_hand(made):
    base, _, light, adapter, recovered = made
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(recovered / "adapter_model.safetensors")
    model, kept = load(base), Manifest.read(light).layers
    head = model.config.head_dim
    assert before.keys() == after.keys()
    for key in before:
        name = key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        block = ".".join(name.split(".")[:3])
        if block not in kept:
            assert torch.equal(before[key], after[key])
            continue
        left = {what: indices(text) for what, text in kept[block]["kept"].items()}
        queries = [h * head + d for g in left["groups"] for h in (2 * g, 2 * g + 1)
                   for d in range(head)]  # fmt: skip
        keys = [g * head + d for g in left["groups"] for d in range(head)]
        places = {"q_proj": (queries, None), "k_proj": (keys, None), "v_proj": (keys, None),
                  "o_proj": (None, queries), "gate_proj": (left["neurons"], None),
                  "up_proj": (left["neurons"], None), "down_proj": (None, left["neurons"])}  # fmt: skip
        rows, columns = places[name.rsplit(".", 1)[1]]
        shape = model.get_submodule(name).weight.shape
        expected = torch.zeros((shape[0], 3) if "lora_B" in key else (3, shape[1]))
        if "lora_B" in key:
            expected[rows if rows is not None else slice(None)] = before[key]
        else:
            expected[:, columns if columns is not None else slice(None)] = before[key]
        assert torch.equal(after[key], expected), key
    config = json.loads((recovered / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert emloc.verify(path=recovered)["layers"] == 28


def test_it_learns_on_the_pruned_model_and_scores_on_the_original(made, tiny, tmp_path):
    base, _, light, adapter, recovered = made
    data = {"dataset": str(tiny.data), "max_length": 96, "max_new_tokens": 0}
    before = emloc.evaluate(model_name_or_path=str(light), **data)["loss"]
    after = emloc.evaluate(model_name_or_path=str(light), adapter=str(adapter), **data)["loss"]
    assert after < before
    plain = emloc.evaluate(model_name_or_path=str(base), **data)["loss"]
    tuned = emloc.evaluate(model_name_or_path=str(base), adapter=str(recovered), **data)["loss"]
    assert tuned != plain
    merged = emloc.merge(adapter=str(recovered), output_dir=tmp_path / "merged")
    assert emloc.evaluate(model_name_or_path=str(merged), **data)["loss"] == pytest.approx(tuned)
    assert emloc.verify(path=light)["kind"] == "emulator"


def test_removing_nothing_is_lora(base, tiny, tmp_path):
    """The same adapter, to the bit, as a LoRA on the base with the same seed."""
    task = task_of(base, tiny.data, keep_ratio=1.0)
    method = LoramStru()
    light = method.build(task, tmp_path / "light")
    adapter = method.train(task, light, tmp_path / "adapter")
    recovered = method.recover(task, light, adapter, tmp_path / "recovered")
    lora = Lora().train(task, None, tmp_path / "lora")
    one, other = (load_file(f / "adapter_model.safetensors") for f in (recovered, lora))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_random_is_by_seed(tiny, tmp_path, base):
    kept = [
        Manifest.read(
            LoramRand().build(task_of(base, tiny.data, seed=seed), tmp_path / name)
        ).layers
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    ]
    assert kept[0] == kept[1]
    assert kept[0] != kept[2]


def test_refusals(tiny, tmp_path):
    base = tiny.base
    with pytest.raises(ConfigError, match="has 3 blocks, of which protected_first=4"):
        LoramRand().build(task_of(base, tiny.data, options={}), tmp_path / "x")
    with pytest.raises(ConfigError, match="budget cannot be met"):
        LoramRand().build(task_of(base, tiny.data, keep_ratio=0.3), tmp_path / "x")
    fused = write_model(tmp_path / "gpt2", "gpt2", n_embd=48, n_head=4, n_layer=4)
    with pytest.raises(ConfigError, match=r"transformer.h.1 \(GPT2Block\) cannot be removed"):
        LoramRand().build(task_of(fused, tiny.data), tmp_path / "x")
    task = task_of(base, tiny.data, keep_ratio=0.8, use_dora=True, max_steps=1)
    light = LoramRand().build(task, tmp_path / "light")
    adapter = LoramRand().train(task, light, tmp_path / "dora")
    with pytest.raises(MismatchError, match="is a DoRA"):
        LoramRand().recover(task, light, adapter, tmp_path / "y")


def test_indices_as_text():
    for found in ([0], [0, 1, 2, 7], [3, 5, 6], list(range(100)), []):
        assert from_text(as_text(torch.tensor(found))).tolist() == found
    assert as_text(torch.tensor([0, 1, 2, 7])) == "0-2,7"


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_alignment_lowers_the_loss_of_the_pruned_model_and_is_said(base, tiny, tmp_path):
    own = {**OWN, "alignment": {"steps": 12, "batch_size": 4, "learning_rate": 3e-3,
                                "dataset": str(tiny.data), "max_length": 64}}  # fmt: skip
    task = task_of(base, tiny.data, options=own)
    light = LoramRand().build(task, tmp_path / "aligned")
    plain = LoramRand().build(task_of(base, tiny.data), tmp_path / "plain")
    data = {"dataset": str(tiny.data), "max_length": 96, "max_new_tokens": 0}
    aligned, before = (
        emloc.evaluate(model_name_or_path=str(folder), completion_only_loss=False, **data)["loss"]
        for folder in (light, plain)
    )
    assert aligned < before - 0.1
    measured = Manifest.read(light).measured
    assert measured["continued_steps"] == 12  # twice the 24 samples in micro-batches of 4
    assert 0 < measured["continued_seconds"] < measured["seconds"]
    assert measured["continued_tokens"] > 2 * 24 * 10
    assert measured["continued_loss"][1] < measured["continued_loss"][0]
    assert sorted(p.name for p in light.iterdir()) == sorted(p.name for p in plain.iterdir())
    head, other = load(light), load(plain)
    assert torch.equal(head.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(
        head.get_submodule("model.layers.0.mlp.up_proj").weight,
        other.get_submodule("model.layers.0.mlp.up_proj").weight,
    )
    assert emloc.verify(path=light)["kind"] == "emulator"


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_an_alignment_that_is_killed_begins_or_ends_where_it_was(base, tiny, tmp_path, monkeypatch):
    from emloc.training import continued

    own = {**OWN, "alignment": {"steps": 3, "batch_size": 4, "max_length": 64}}
    task = task_of(base, tiny.data, options=own)
    whole = LoramRand().build(task, tmp_path / "whole")
    out = tmp_path / "killed"
    calls = []

    def killed_after(write):
        def call(*given):
            calls.append(1)
            if len(calls) == 2:  # the second time, when all new weights are written
                write(*given)
            raise KeyboardInterrupt

        return call

    with monkeypatch.context() as patch:
        patch.setattr(continued, "_write_beside", killed_after(continued._write_beside))
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                LoramRand().build(task, out)
    with monkeypatch.context() as patch:
        patch.setattr(continued, "train_further", None)  # is not done again
        LoramRand().build(task, out)
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()
