"""What PEFT offers on linear layers, through train, correct and merge, against stock PEFT."""

import json

import pytest
import torch
from chosen_limit import chosen_limit
from llm_reference import load, logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.errors import CheckpointError, ConfigError, MismatchError
from emloc.extend.plugin_options import with_plugin_options
from emloc.integrations.peft.lora import new_lora


def train(tiny, folder, **options):
    return emloc.train(output_dir=folder, **{**tiny.train_options, "max_steps": 2, **options})


def correct(tiny, adapter, folder, **options):
    return emloc.correct(
        output_dir=folder, **{**tiny.correct_options, "adapter": str(adapter), **options}
    )


def merged_equals_stock(tiny, corrected, folder):
    merged = emloc.merge(adapter=str(corrected), output_dir=folder)
    stock = PeftModel.from_pretrained(load(tiny.base), str(corrected)).merge_and_unload()
    ours = load(merged).state_dict()
    return all(torch.equal(tensor, ours[name]) for name, tensor in stock.state_dict().items())


def acts_as_on_the_emulator(tiny, adapter, corrected):
    """(W + s·B_c·A)P = (W_e + s·B·A)P by pseudo-inverse, at a few layers."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, corrected))
    base, emulator = load(tiny.base), load(tiny.emulator)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj"):
        a, b, c = (
            t[f"base_model.model.{name}.lora_{k}.weight"].double()
            for t, k in ((before, "A"), (before, "B"), (after, "B"))
        )
        onto = torch.linalg.pinv(a) @ a
        weight = base.get_submodule(name).weight.double()
        compressed = emulator.get_submodule(name).weight.double()
        wanted = (compressed + scaling * b @ a) @ onto
        assert (wanted - (weight + scaling * c @ a) @ onto).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", "eva"])
@pytest.mark.parametrize("rslora", [False, True])
def test_beginnings(tiny, tmp_path, init, rslora):
    adapter = train(tiny, tmp_path / "a", lora_init=init, use_rslora=rslora)
    corrected = correct(tiny, adapter, tmp_path / "c", limit="none")
    if init != "eva":  # which gives ranks of their own to layers
        acts_as_on_the_emulator(tiny, adapter, corrected)
    assert merged_equals_stock(tiny, corrected, tmp_path / "m")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_residual_beginnings_change_nothing_before_the_first_step(tiny, batch, init):
    from emloc.config import TrainConfig

    options = {"emulator": str(tiny.emulator), "lora_init": init, "lora_r": 4}
    config = with_plugin_options(TrainConfig)(output_dir="o", **options)
    plain, emulator = load(tiny.emulator), load(tiny.emulator)
    model, start = new_lora(emulator, config, [])
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), rtol=0, atol=1e-4)
    down, up = start["model.layers.1.mlp.up_proj"]
    weight = plain.get_submodule("model.layers.1.mlp.up_proj").weight
    best = torch.linalg.svdvals(weight)[:4].square().sum().sqrt()
    scaling = config.lora_alpha / config.lora_r
    if init == "pissa":  # the part taken off is the best of its rank
        torch.testing.assert_close((scaling * up @ down).norm(), best)
    # Stock PEFT on dense weights of the same model begins with the same product.
    dense = load(tiny.base)
    for name, module in plain.named_modules():
        if type(module).__name__ == "LowRankLinear":
            dense.get_submodule(name).weight.data = module.weight.data
    targets = ["up_proj"]
    stock = get_peft_model(
        dense, LoraConfig(r=4, lora_alpha=32, target_modules=targets, init_lora_weights=init)
    )
    layer = stock.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    theirs = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(up @ down, theirs.detach(), rtol=1e-3, atol=1e-4)


def test_a_residual_lora_resumes_exactly(tiny, tmp_path):
    whole = train(tiny, tmp_path / "whole", lora_init="pissa", max_steps=4)
    tensors = load_file(whole / "adapter_model.safetensors")
    half = tmp_path / "half"
    with pytest.MonkeyPatch.context() as patch:
        from emloc.integrations.transformers import lora_training

        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr(lora_training, "save_as_plain_lora", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, half, lora_init="pissa", max_steps=4)
    again = train(tiny, half, lora_init="pissa", max_steps=4)
    for name, tensor in load_file(again / "adapter_model.safetensors").items():
        assert torch.equal(tensor, tensors[name])


def test_dora_and_residual_beginnings_exclude_one_another(tiny, tmp_path):
    with pytest.raises(ConfigError, match="exclude each other"):
        train(tiny, tmp_path / "a", lora_init="pissa", use_dora=True)


def test_loraplus_teaches_b_faster(tiny, tmp_path):
    plain = load_file(train(tiny, tmp_path / "a") / "adapter_model.safetensors")
    faster = train(tiny, tmp_path / "b", loraplus_lr_ratio=16)
    found = load_file(faster / "adapter_model.safetensors")

    def size(tensors):
        return sum(float(t.norm()) for name, t in tensors.items() if "lora_B" in name)

    assert size(found) > 4 * size(plain)
    assert merged_equals_stock(tiny, correct(tiny, faster, tmp_path / "c"), tmp_path / "m")


def test_blocks_to_transform(tiny, tmp_path):
    for targets in ("all-linear", "q_proj,v_proj"):
        folder = train(
            tiny,
            tmp_path / targets[:1],
            lora_layers_to_transform="0,2",
            lora_target_modules=targets,
        )
        names = Checkpoint.from_files("a", folder, {}, {"adapter_model.safetensors": None}).tensors
        assert {name.split("layers.")[1][0] for name in names} == {"0", "2"}
        assert len(names) == (28 if targets == "all-linear" else 8)
    corrected = correct(tiny, folder, tmp_path / "c")
    assert merged_equals_stock(tiny, corrected, tmp_path / "m")
    for blocks in ("9", "0,3"):
        with pytest.raises(ConfigError, match=r"no block . in model\.layers \(0 to 2\)"):
            train(tiny, tmp_path / "x", lora_layers_to_transform=blocks)
    with pytest.raises(ConfigError, match=r"is called h; the stacks are model\.layers \(0 to 2\)"):
        train(tiny, tmp_path / "x", lora_layers_to_transform="0", lora_layers_pattern="h")
    with pytest.raises(ConfigError, match="pass both"):
        train(tiny, tmp_path / "x", lora_layers_pattern="layers")
    named = train(
        tiny, tmp_path / "n", lora_layers_to_transform="0,2", lora_layers_pattern="layers",
        lora_target_modules="q_proj,v_proj",
    )  # fmt: skip
    weights = [load_file(path / "adapter_model.safetensors") for path in (named, folder)]
    assert weights[0].keys() == weights[1].keys()


def test_modules_to_save(tiny, tmp_path, batch):
    adapter = train(tiny, tmp_path / "a", lora_modules_to_save="lm_head,norm")
    corrected = correct(tiny, adapter, tmp_path / "c", limit="auto")
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(corrected / "adapter_model.safetensors")
    head = "base_model.model.lm_head.weight"
    assert torch.equal(before[head], after[head])
    assert not torch.equal(before[head], load(tiny.base).lm_head.weight)
    assert merged_equals_stock(tiny, corrected, tmp_path / "m")
    # The loss by which the limit was chosen is that of the adapter as PEFT runs it.
    summary = Manifest.read(corrected).summary
    chosen, losses = summary["limit"], summary["calibration_loss"]
    assert chosen == chosen_limit(summary)
    scores = emloc.evaluate(
        model_name_or_path=str(tiny.base), adapter=str(corrected), dataset=str(tiny.data),
        max_new_tokens=0, max_length=96,
    )  # fmt: skip
    assert scores["loss"] == pytest.approx(losses[chosen], rel=1e-4)


def test_a_compressed_module_cannot_be_saved_whole(tiny, tmp_path):
    model = load(tiny.emulator)
    model = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.0.mlp.up_proj.weight"] = torch.zeros(80, 48)
    from safetensors.torch import save_file

    save_file(tensors, path)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["modules_to_save"] = ["lm_head", "up_proj"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match="which the emulator compresses"):
        correct(tiny, tmp_path / "a", tmp_path / "c", limit="none")


def test_several_adapters_of_one_model(tiny, tmp_path):
    model = get_peft_model(load(tiny.emulator), LoraConfig(r=4, target_modules=["q_proj"]), "first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], use_rslora=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "both")
    with pytest.raises(CheckpointError, match="several adapters; pass one of first, second"):
        correct(tiny, tmp_path / "both", tmp_path / "c", limit="none")
    found = [
        correct(tiny, tmp_path / "both" / name, tmp_path / name, limit="none")
        for name in ("first", "second")
    ]
    base = PeftModel.from_pretrained(load(tiny.base), str(found[0]), adapter_name="first")
    base.load_adapter(str(found[1]), adapter_name="second")
    assert set(base.peft_config) == {"first", "second"}
    for name, folder in zip(("first", "second"), found):
        acts = {"first": "q_proj", "second": "v_proj"}[name]
        assert all(acts in layer for layer in Manifest.read(folder).layers)
        assert merged_equals_stock(tiny, folder, tmp_path / f"m-{name}")


def test_patterns_and_ranks_that_cannot_be_are_one_sentence(tiny, tmp_path):
    options = {**tiny.train_options, "output_dir": tmp_path / "out"}
    for option in ("lora_rank_pattern", "lora_alpha_pattern"):
        with pytest.raises(ConfigError, match=r"'\*q' is not a regular expression"):
            emloc.train(**{**options, option: "*q=4"})
    for start in ("olora", "pissa"):
        with pytest.raises(ConfigError, match=rf"lora_init={start} .* pass lora_r="):
            emloc.train(**{**options, "lora_init": start, "lora_r": 100})
