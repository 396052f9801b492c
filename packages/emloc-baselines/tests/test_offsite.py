"""Offsite-Tuning against renaming by hand, for models whose blocks differ and whose caches count layers."""

import json

import pytest
import torch
from pruning_reference import load
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.errors import ConfigError
from emloc.extend.methods import Task
from emloc.integrations.transformers.lively_model import lively_model
from emloc_baselines.distillation import _Middle, _through
from emloc_baselines.lora import Lora
from emloc_baselines.offsite import OffsiteTuning
from emloc_baselines.thinning import thinned_config, uniform
from emloc_llm.example import write_model

DEPTH = 7
KINDS = {
    "llama": {},
    # Every other block looks at a window only: which block is which must stay with the block.
    "qwen2": {
        "use_sliding_window": True, "sliding_window": 4, "layer_types":
        ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"],
    },
    "gpt2": {"n_embd": 48, "n_head": 4, "n_layer": DEPTH, "n_positions": 128},
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(KINDS))
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "base"
    return write_model(
        folder,
        request.param,
        num_hidden_layers=DEPTH,
        max_shard_size="90KB",
        **KINDS[request.param],
    )


def task_of(base, data, keep_ratio=0.75, options=None, **train):
    common = {"dataset": str(data), "max_length": 96}
    training = {**common, "max_steps": 3, "lora_r": 3, "learning_rate": 1e-2, "logging_steps": 1,
                **train}  # fmt: skip
    compress = {**common, "format": "low_rank"}
    return Task(str(base), keep_ratio, 0, compress, training, {}, options or {"trained_blocks": 1})


@pytest.fixture(scope="module")
def made(base, tiny, tmp_path_factory):
    root, task, method = (
        tmp_path_factory.mktemp("offsite"),
        task_of(base, tiny.data),
        OffsiteTuning(),
    )
    light = method.build(task, root / "light")
    adapter = method.train(task, light, root / "adapter")
    return base, light, adapter, method.recover(task, light, adapter, root / "recovered")


def blocks_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def kept(light):
    entries = Manifest.read(light).layers
    return [int(entry["original"].rpartition(".")[2]) for entry in entries.values()]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 28])
@pytest.mark.parametrize("left", [2, 3, 4, 28])
def test_the_middle_is_thinned_uniformly(count, left):
    if left > count:
        return
    found = uniform(count, left)
    assert found == [round(i * (count - 1) / (left - 1)) for i in range(left)]
    assert (found[0], found[-1]) == (0, count - 1)
    assert len(set(found)) == left
    assert uniform(count, 1) == [(count - 1) // 2]


def test_the_light_model_is_the_base_with_blocks_taken_out_by_hand(made):
    base, light, *_ = made
    numbers = kept(light)
    assert 3 <= len(numbers) < DEPTH
    assert (numbers[0], numbers[-1]) == (0, DEPTH - 1)
    whole, model = load(base), load(light)
    stack = blocks_of(whole)
    left = torch.nn.ModuleList([stack[i] for i in numbers])
    for index, block in enumerate(left):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    whole.config.num_hidden_layers = len(numbers)
    if whole.config.model_type == "qwen2":
        whole.config.layer_types = [whole.config.layer_types[i] for i in numbers]
        assert model.config.layer_types == whole.config.layer_types
        assert len(set(model.config.layer_types)) == 2
    if hasattr(whole, "transformer"):
        whole.transformer.h = left
    else:
        whole.model.layers = left
    ids = torch.randint(3, 250, (2, 13))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert len(blocks_of(model)) == len(numbers)
    assert "quantization_config" not in json.loads((light / "config.json").read_text())


def test_it_generates_with_a_cache(made):
    model = load(made[1])
    ids = torch.randint(3, 250, (1, 9))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        cached = model.generate(ids, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_the_budget_is_met_from_below_within_one_block(base, tiny, tmp_path):
    """The budget itself is compared with what EMLoC writes in the tests of LoRAM."""
    for keep_ratio in (0.5, 0.9):
        light = OffsiteTuning().build(
            task_of(base, tiny.data, keep_ratio), tmp_path / str(keep_ratio)
        )
        held = 4 * sum(p.numel() for p in load(light).parameters())
        target = Manifest.read(light).summary["budget_bytes"]
        block = 4 * sum(p.numel() for p in blocks_of(load(base))[0].parameters())
        assert target - block < held <= target


def test_only_the_ends_are_trained_and_are_renamed_as_by_hand(made):
    base, light, adapter, recovered = made
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(recovered / "adapter_model.safetensors")
    last = len(kept(light)) - 1
    stack = "transformer.h" if "gpt2" in str(base) else "model.layers"
    blocks = {key.split(f"{stack}.")[1].split(".")[0] for key in before}
    assert blocks == {"0", str(last)}
    by_hand = {key.replace(f"{stack}.{last}.", f"{stack}.{DEPTH - 1}."): value
               for key, value in before.items()}  # fmt: skip
    assert by_hand.keys() == after.keys()
    assert all(torch.equal(by_hand[key], after[key]) for key in after)
    config = json.loads((recovered / "adapter_config.json").read_text())
    assert {name.split(f"{stack}.")[1].split(".")[0] for name in config["target_modules"]} == {
        "0", str(DEPTH - 1),
    }  # fmt: skip
    assert emloc.verify(path=recovered)["layers"] == len(config["target_modules"])


def test_it_scores_on_the_original_and_merges(made, tiny, tmp_path):
    base, light, adapter, recovered = made
    data = {"dataset": str(tiny.data), "max_length": 96, "max_new_tokens": 0}
    plain = emloc.evaluate(model_name_or_path=str(base), **data)["loss"]
    tuned = emloc.evaluate(model_name_or_path=str(base), adapter=str(recovered), **data)["loss"]
    assert tuned != plain
    merged = emloc.merge(adapter=str(recovered), output_dir=tmp_path / "merged")
    assert emloc.evaluate(model_name_or_path=str(merged), **data)["loss"] == pytest.approx(tuned)
    before = emloc.evaluate(model_name_or_path=str(light), **data)["loss"]
    after = emloc.evaluate(model_name_or_path=str(light), adapter=str(adapter), **data)["loss"]
    assert after < before


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_removing_nothing_is_lora_in_the_same_blocks(base, tiny, tmp_path):
    task = task_of(base, tiny.data, keep_ratio=1.0)
    method = OffsiteTuning()
    light = method.build(task, tmp_path / "light")
    adapter = method.train(task, light, tmp_path / "adapter")
    recovered = method.recover(task, light, adapter, tmp_path / "recovered")
    ends = task_of(base, tiny.data, lora_layers_to_transform=[0, DEPTH - 1])
    lora = Lora().train(ends, None, tmp_path / "lora")
    one, other = (load_file(f / "adapter_model.safetensors") for f in (recovered, lora))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_distillation_brings_the_thinned_middle_to_the_full_one(base, tiny, tmp_path):
    own = {"trained_blocks": 1,
           "distillation": {"steps": 12, "batch_size": 4, "learning_rate": 3e-3, "max_length": 64,
                            "lm_weight": 0.0}}  # fmt: skip
    distilled = OffsiteTuning().build(task_of(base, tiny.data, options=own), tmp_path / "distilled")
    plain = OffsiteTuning().build(task_of(base, tiny.data), tmp_path / "plain")
    first, last = Manifest.read(distilled).measured["continued_loss"]
    assert last < 0.9 * first
    one, other, whole = load(distilled), load(plain), load(base)
    numbers = kept(plain)
    for index in range(len(numbers)):
        same = all(
            torch.equal(a, b)
            for a, b in zip(
                one.model.layers[index].parameters(), other.model.layers[index].parameters()
            )
        )
        assert same == (index in (0, len(numbers) - 1)), index
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    # The first loss is that of the thinned model, computed here anew: full middle against thinned.
    ids = torch.randint(3, 250, (2, 9))
    seen = {}
    handles = [
        other.model.layers[1].register_forward_pre_hook(
            lambda m, args, named: seen.update(args=args, named=named), with_kwargs=True
        ),
        other.model.layers[len(numbers) - 2].register_forward_hook(
            lambda m, args, out: seen.update(out=out)
        ),
    ]
    with torch.no_grad():
        other(input_ids=ids, use_cache=False)
        hidden = seen["args"][0]
        for layer in whole.model.layers[1 : DEPTH - 1]:
            hidden = layer(hidden, **seen["named"])
    for handle in handles:
        handle.remove()
    distance = ((hidden - seen["out"]) / hidden.square().mean().sqrt()).square().mean()
    assert 0.3 < 30 * float(distance) / first < 3  # of other tokens, so about as large


def test_refusals(tiny, tmp_path, base):
    with pytest.raises(
        ConfigError, match="has no room for 6 trained blocks and one between, of the 7"
    ):
        OffsiteTuning().build(task_of(base, tiny.data, 0.5, {"trained_blocks": 3}), tmp_path / "x")
    light = OffsiteTuning().build(task_of(base, tiny.data), tmp_path / "light")
    with pytest.raises(ConfigError, match="leave lora_layers_to_transform out"):
        OffsiteTuning().train(
            task_of(base, tiny.data, lora_layers_to_transform=[1]), light, tmp_path / "y"
        )


def test_a_vision_language_config_is_thinned_inside():
    config = {
        "text_config": {"num_hidden_layers": 4, "layer_types": list("abcd"), "x": [1, 2]},
        "y": 4,
    }
    found = thinned_config(config, 4, [0, 3])
    assert found == {
        "text_config": {"num_hidden_layers": 2, "layer_types": ["a", "d"], "x": [1, 2]}, "y": 4,
    }  # fmt: skip


def test_a_teacher_that_is_the_student_is_at_no_distance():
    """Its blocks see a window or all, and turn positions by different angles."""
    torch.manual_seed(0)
    kinds = ["full_attention" if (n + 1) % 3 == 0 else "sliding_attention" for n in range(8)]
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, num_hidden_layers=8, sliding_window=8, layer_types=kinds,
    )  # fmt: skip
    model = lively_model(AutoModelForCausalLM, config, 0).eval()
    blocks, ids = [f"model.layers.{n}" for n in range(1, 7)], torch.randint(64, (2, 24))

    def run():
        return model(input_ids=ids, use_cache=False)

    with torch.no_grad(), _Middle(model, blocks) as seen:
        run()
    target = _through(model, blocks, seen.entered, run)
    torch.testing.assert_close(target, seen.left)
    assert not model.model.layers[1]._forward_pre_hooks
