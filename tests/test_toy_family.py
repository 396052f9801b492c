"""The toy's own LoRA and layers beside those of PEFT, which reads its adapters and draws the same."""

import json

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.extend.capabilities import example_of
from emloc.testing import plugin_installed
from emloc.testing.toy_family import ToyFamily

LAYERS = ["conv", "gate", "up", "down"]


def test_stock_peft_trains_the_same_adapter_and_reads_it(tmp_path):
    """On an emulator with a low-rank convolution: three steps of AdamW, by PEFT and torch alone."""
    family = ToyFamily()
    example = example_of(family, tmp_path)
    with plugin_installed("emloc.testing.toy_plugin"):
        emulator = emloc.compress(
            output_dir=tmp_path / "e", format="low_rank", keep_ratio=0.5, **example
        )
        adapter = emloc.train(
            emulator=str(emulator), dataset=example["dataset"], output_dir=tmp_path / "a",
            max_steps=3, per_device_train_batch_size=24, learning_rate=1e-2, lora_r=3, lora_alpha=5,
            use_rslora=True,
        )  # fmt: skip
    ours = load_file(adapter / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(
        family.load(Checkpoint.open(emulator), "auto", "cpu"), str(adapter)
    ).eval()
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 12

    model = get_peft_model(
        family.load(Checkpoint.open(emulator), "auto", "cpu"),
        LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=LAYERS),
    )
    trained = dict(model.named_parameters())
    first = {}  # A as our training draws it
    torch.manual_seed(0)
    for name in config["target_modules"]:
        layer = loaded.get_submodule(f"base_model.model.{name}.base_layer")
        if isinstance(layer, torch.nn.Conv2d):
            drawn = torch.nn.Conv2d(layer.in_channels, 3, 3, padding=1, bias=False)
            torch.nn.Conv2d(3, layer.out_channels, 1, bias=False)
        else:
            drawn = torch.nn.Linear(layer.in_features, 3, bias=False)
            torch.nn.Linear(3, layer.out_features, bias=False)
        first[f"base_model.model.{name}.lora_A.default.weight"] = drawn.weight.detach()
    with torch.no_grad():
        for name, value in first.items():
            trained[name].copy_(value)
    optimizer = torch.optim.AdamW(
        [p for p in trained.values() if p.requires_grad], lr=1e-2, weight_decay=0
    )
    data = load_file(example["dataset"])  # one micro-batch of all: their order does not matter
    for _ in range(3):
        torch.nn.functional.cross_entropy(model(data["pictures"]), data["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(ours) == 24
    for name, value in ours.items():
        theirs = trained[name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(value, theirs.detach(), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        scores = loaded(data["pictures"])
        torch.testing.assert_close(scores, model.eval()(data["pictures"]), rtol=1e-3, atol=1e-3)
        plain = family.load(Checkpoint.open(emulator), "auto", "cpu")(data["pictures"])
    assert (scores - plain).abs().max() > 0.01
