"""UPop against direct constructions: masks' gradients, ranking, schedule, the sliced model, the way back."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_reference import indices, load
from safetensors.torch import load_file

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.config import CompressConfig
from emloc.errors import ConfigError
from emloc.extend.methods import Task
from emloc.extend.opening import open_model
from emloc.extend.plugin_options import with_plugin_options
from emloc.streaming.stream import UnitStream
from emloc_baselines.light import Source
from emloc_baselines.lora import Lora
from emloc_baselines.masks import Masks, accumulate_gradients
from emloc_baselines.structures import find_structures
from emloc_baselines.upop import Entry, Upop, entry_bytes, rank, schedule
from emloc_llm.example import write_model

KINDS = {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": 24}}
SHAPE = {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3}


@pytest.fixture(scope="module", params=sorted(KINDS))
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "base"
    return write_model(folder, request.param, **{**SHAPE, **KINDS[request.param]})


def task_of(base, data, keep_ratio=0.6, **train):
    common = {"dataset": str(data), "max_length": 96}
    training = {**common, "max_steps": 3, "lora_r": 3, "lora_alpha": 12, "learning_rate": 1e-2,
                "logging_steps": 1, **train}  # fmt: skip
    compress = {
        **common,
        "format": "low_rank",
        "num_calibration_samples": 8,
        "calibration_batch_size": 3,
    }
    return Task(str(base), keep_ratio, 0, compress, training, {}, {"search_steps": 4})


def source_of(task):
    base, family = open_model(task.model_name_or_path)
    config = with_plugin_options(CompressConfig)(
        model_name_or_path=task.model_name_or_path, output_dir="unused",
        keep_ratio=task.keep_ratio, seed=task.seed, **task.compress,
    )  # fmt: skip
    return Source(base, family, config, family.calibration_batches(base, config))


@pytest.fixture(scope="module")
def made(base, tiny, tmp_path_factory):
    root, task, method = tmp_path_factory.mktemp("upop"), task_of(base, tiny.data), Upop()
    light = method.build(task, root / "light")
    adapter = method.train(task, light, root / "adapter")
    return base, task, light, adapter, method.recover(task, light, adapter, root / "recovered")


class Masked(torch.nn.Module):
    """A whole model with masks written into its forward by hand."""

    def __init__(self, folder, dims, neurons):
        super().__init__()
        self.model = load(folder).requires_grad_(False)
        for index, block in enumerate(self.model.model.layers):
            for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                layer.register_forward_hook(self.on_heads(dims[index]))
            block.mlp.up_proj.register_forward_hook(
                lambda m, x, out, mask=neurons[index]: out * mask
            )

    def on_heads(self, half):
        def hook(module, inputs, output):
            mask = torch.cat([half, half])
            shaped = output.view(*output.shape[:-1], -1, len(mask))
            return (shaped * mask).view(output.shape)

        return hook

    def loss(self, batches):
        total = 0
        for batch in batches:
            logits = self.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits[:, :-1]
            total = total + torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1),
                reduction="sum",
            )  # fmt: skip
        return total


def test_gradients_of_masks_are_those_of_the_whole_model_and_add_up(base, tiny):
    source = source_of(task_of(base, tiny.data))
    stream = UnitStream(source.family, source.base)
    structures = find_structures(stream.model, stream.blocks)
    masks = [Masks.ones(found, torch.zeros(())) for found in structures]
    values = [torch.rand(len(m.dims)) for m in masks], [torch.rand(len(m.neurons)) for m in masks]
    for mask, dims, neurons in zip(masks, *values):
        mask.set(dims, neurons)
    for batch in source.batches:
        accumulate_gradients(stream, [batch], masks)
    by_hand = [[v.clone().requires_grad_() for v in kind] for kind in values]
    Masked(base, *by_hand).loss(source.batches).backward()
    for index, mask in enumerate(masks):
        for found, wanted in ((mask.dims, by_hand[0][index]), (mask.neurons, by_hand[1][index])):
            assert torch.allclose(found.grad, wanted.grad, rtol=2e-3, atol=1e-3)
            assert found.grad.abs().max() > 0.01
    assert not stream.model.get_submodule(structures[0].attention.query)._forward_hooks


def test_the_schedule_rises_to_everything():
    found = [schedule(step, 10) for step in range(10)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(1)
    assert found[4] == pytest.approx(math.sqrt(0.5))
    assert found[0] == pytest.approx(math.sin(math.pi / 20))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.9))
def test_ranking_takes_the_largest_z_scores_until_enough_is_saved(seed, share):
    draw = torch.Generator().manual_seed(seed)
    sizes = [(4, 9), (6, 5)]
    gradients = [torch.randn(n, generator=draw) * (1 + 50 * (i % 2)) for i, n in
                 enumerate(n for pair in sizes for n in pair)]  # fmt: skip
    weights = [Entry(7, 2), Entry(5, 3)]
    total = sum(w[k] * n for w, pair in zip(weights, sizes) for k, n in enumerate(pair))
    closed = rank(gradients, weights, share * total)
    pools = [torch.cat(gradients[k::2]).double() for k in (0, 1)]
    scored = [
        (float((g - pools[i % 2].mean()) / pools[i % 2].std()), weights[i // 2][i % 2], i, j)
        for i, part in enumerate(gradients)
        for j, g in enumerate(part.double())
        if j != int(part.argmin())
    ]
    expected, saved = set(), 0
    for _, weight, i, j in sorted(scored, key=lambda entry: -entry[0]):
        if saved >= share * total:
            break
        expected.add((i, j))
        saved += weight
    assert {(i, int(j)) for i, part in enumerate(closed) for j in part.nonzero()} == expected
    assert all(not bool(part.all()) for part in closed)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("rank_by", ["gradient", "magnitude"])
def test_one_step_closes_by_the_gradient_or_by_its_magnitude(base, tiny, rank_by, tmp_path):
    task = task_of(base, tiny.data)
    task = replace(task, options={"search_steps": 1, "rank_by": rank_by})
    kept = Manifest.read(Upop().build(task, tmp_path / "light")).layers
    source = source_of(task)
    stream = UnitStream(source.family, source.base)
    structures = find_structures(stream.model, stream.blocks)
    masks = [Masks.ones(found, torch.zeros(())) for found in structures]
    accumulate_gradients(stream, source.batches[:1], masks)
    order = {"gradient": lambda g: g, "magnitude": lambda g: -g.abs()}[rank_by]
    left = [indices(layer["kept"]["neurons"]) for layer in kept.values()]
    assert any(len(some) < len(mask.neurons) for some, mask in zip(left, masks))
    everything = torch.cat([order(mask.neurons.grad) for mask in masks])
    closed = torch.cat(
        [~torch.isin(torch.arange(len(m.neurons)), torch.tensor(k)) for m, k in zip(masks, left)]
    )
    # Each block keeps its best-ranked entry, whatever the others say.
    spared = torch.cat([order(m.neurons.grad) == order(m.neurons.grad).min() for m in masks])
    assert everything[closed].min() >= everything[~closed & ~spared].max()


def test_a_sliced_model_computes_what_the_masked_one_does(made):
    """Also under norms of queries and keys, whose mean runs over the dimensions that there were."""
    base, _, light, *_ = made
    entries = list(Manifest.read(light).layers.values())
    model = load(base)
    head = model.config.head_dim
    dims, neurons = [], []
    for entry in entries:
        kept = {name: indices(text) for name, text in entry["kept"].items()}
        assert kept["groups"] == [0, 1, 2]
        half = torch.zeros(head // 2)
        half[[d for d in kept["dims"] if d < head // 2]] = 1
        assert kept["dims"] == [
            d + o for o in (0, head // 2) for d in half.nonzero().reshape(-1).tolist()
        ]
        dims.append(half)
        neurons.append(torch.zeros(80).index_fill(0, torch.tensor(kept["neurons"]), 1))
    assert any(float(half.mean()) < 1 for half in dims)
    assert any(float(mask.mean()) < 1 for mask in neurons)
    ids = torch.randint(3, 250, (2, 11))
    sliced = load(light)
    with torch.no_grad():
        expected = Masked(base, dims, neurons).model(input_ids=ids).logits
        found, whole = sliced(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=2e-4)
    assert (found - whole).abs().max() > 0.1


def test_it_generates_with_a_cache(made):
    model = load(made[2])
    ids = torch.randint(3, 250, (1, 9))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        cached = model.generate(ids, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("keep_ratio", [0.4, 0.8])
def test_the_budget_is_met_from_below_within_one_structure(base, tiny, keep_ratio, tmp_path):
    task = task_of(base, tiny.data, keep_ratio)
    light = Upop().build(task, tmp_path / "light")
    held = sum(p.numel() * 4 for p in load(light).parameters())
    target = Manifest.read(light).summary["budget_bytes"]
    source = source_of(task)
    stream = UnitStream(source.family, source.base)
    weights = [entry_bytes(stream, s) for s in find_structures(stream.model, stream.blocks)]
    assert target - max(max(w) for w in weights) < held <= target
    head = load(base).config.head_dim
    # Pair of rows of q (6 heads), k and v (3 each), of columns of o, biases and norms with them.
    per_dim = 48 * (6 + 3 + 3 + 6)
    extras = {"qwen2": 6 + 3 + 3, "qwen3": 2}.get(load(base).config.model_type, 0)
    assert weights[0] == Entry(2 * 4 * (per_dim + extras), 3 * 48 * 4)
    assert head % 2 == 0


def test_the_recovered_adapter_is_scattered_by_hand(made):
    base, _, light, adapter, recovered = made
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(recovered / "adapter_model.safetensors")
    kept = Manifest.read(light).layers
    model = load(base)
    head = model.config.head_dim
    assert before.keys() == after.keys()
    for key in before:
        name = key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        left = kept[".".join(name.split(".")[:3])]["kept"]
        leaf, dims = name.rsplit(".", 1)[1], indices(left["dims"])
        places = {
            "q_proj": [h * head + d for h in range(6) for d in dims],
            "k_proj": [g * head + d for g in range(3) for d in dims],
        }
        places |= {"o_proj": places["q_proj"], "v_proj": places["k_proj"]}
        place = places.get(leaf, indices(left["neurons"]))
        sliced_axis = 1 if leaf in ("o_proj", "down_proj") else 0
        shape = model.get_submodule(name).weight.shape
        if "lora_B" in key:
            expected = torch.zeros(shape[0], 3)
            expected[place if sliced_axis == 0 else slice(None)] = before[key]
        else:
            expected = torch.zeros(3, shape[1])
            expected[:, place if sliced_axis == 1 else slice(None)] = before[key]
        assert torch.equal(after[key], expected), key
    assert json.loads((recovered / "adapter_config.json").read_text())["r"] == 3
    assert emloc.verify(path=recovered)["layers"] == 21


@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_removing_nothing_is_lora(base, tiny, tmp_path):
    task, method = task_of(base, tiny.data, keep_ratio=1.0), Upop()
    light = method.build(task, tmp_path / "light")
    adapter = method.train(task, light, tmp_path / "adapter")
    recovered = method.recover(task, light, adapter, tmp_path / "recovered")
    lora = Lora().train(task, None, tmp_path / "lora")
    one, other = (load_file(f / "adapter_model.safetensors") for f in (recovered, lora))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_refusals(base, tiny, tmp_path):
    with pytest.raises(ConfigError, match="budget cannot be met even with one head dimension"):
        Upop().build(task_of(base, tiny.data, keep_ratio=0.01), tmp_path / "x")
    for kind in ("cohere", "stablelm"):  # turns neighbours; turns a part of the dimensions
        other = write_model(tmp_path / kind, kind, **SHAPE)
        with pytest.raises(ConfigError, match="are not rotated in pairs"):
            Upop().build(task_of(other, tiny.data), tmp_path / "y")
