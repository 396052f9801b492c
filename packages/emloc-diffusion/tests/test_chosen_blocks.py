"""Blocks by their number in a stack, where names hold many other numbers."""

import json

import pytest
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from safetensors.torch import load_file

import emloc
from emloc.artefacts.adapter import Adapter
from emloc.config import PlanConfig, build
from emloc.errors import ConfigError
from emloc.extend.plugin_options import with_plugin_options
from emloc.planning.subject import Subject
from emloc_diffusion.example import write_pictures
from emloc_diffusion.example_pipelines import RESOLUTION, write_pipeline


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    root = tmp_path_factory.mktemp("flux")
    return write_pipeline(root / "base", "flux", 0), write_pictures(root / "pictures", 3, 0)


def train(made, folder, **options):
    base, pictures = made
    return emloc.train(
        model_name_or_path=str(base), instance_data_dir=str(pictures), max_steps=1, lora_r=2,
        instance_prompt="a photo of sks square", resolution=RESOLUTION, output_dir=folder, **options,
    )  # fmt: skip


def planned(made, **options):
    config = build(
        with_plugin_options(PlanConfig),
        {"model_name_or_path": str(made[0]), "resolution": RESOLUTION, **options}, "plan",
    )  # fmt: skip
    return Subject.of(str(made[0]), "auto").adapted(config)


def names_in(folder):
    return {layer.name for layer in Adapter.open(str(folder)).layers}


def test_numbers_in_names_are_no_blocks(flux, tmp_path):
    """`ff.net.2` and `to_out.0` lie in every block."""
    for number in ("2", "0"):
        with pytest.raises(ConfigError, match=r"transformer_blocks \(0 to 1\), single_transf"):
            train(flux, tmp_path / "x", lora_layers_to_transform=number)
    with pytest.raises(ConfigError, match=r"no block 2 in transformer_blocks \(0 to 1\)\."):
        train(
            flux, tmp_path / "x", lora_layers_to_transform="2",
            lora_layers_pattern="transformer_blocks",
        )  # fmt: skip


@pytest.mark.parametrize("targets", ["all-linear", "to_q,to_out.0,ff.net.2"])
@pytest.mark.parametrize("pattern", ["transformer_blocks", "single_transformer_blocks"])
def test_as_peft_counts_them(flux, tmp_path, pattern, targets):
    options = {
        "lora_layers_to_transform": [1], "lora_layers_pattern": [pattern],
        "lora_target_modules": targets.split(","),
    }  # fmt: skip
    folder = train(flux, tmp_path / "a", **options)
    names = names_in(folder)
    assert names
    assert all(name.startswith(f"{pattern}.1.") for name in names)
    assert planned(flux, **options) == names
    if targets != "all-linear":
        model = FluxTransformer2DModel.from_pretrained(flux[0] / "transformer")
        model.add_adapter(
            LoraConfig(
                target_modules=targets.split(","), layers_to_transform=[1], layers_pattern=[pattern]
            )
        )
        theirs = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
        assert names == theirs
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] is None


def test_both_stacks_may_be_named(flux, tmp_path):
    options = {
        "lora_layers_to_transform": [0],
        "lora_layers_pattern": ["transformer_blocks", "single_transformer_blocks"],
    }
    names = names_in(train(flux, tmp_path / "a", **options))
    assert {name.partition(".")[0] for name in names} == set(options["lora_layers_pattern"])
    assert {name.split(".")[1] for name in names} == {"0"}
    assert planned(flux, **options) == names


def test_stacks_inside_of_others_are_named(tiny, tmp_path):
    made = tiny.base, tiny.pictures
    with pytest.raises(ConfigError, match=r"down_blocks \(0 to .\).*up_blocks \(0 to .\)"):
        train(made, tmp_path / "x", lora_layers_to_transform="0")
    options = {"lora_layers_to_transform": [0], "lora_layers_pattern": ["down_blocks"]}
    names = names_in(train(made, tmp_path / "a", **options))
    assert all(name.startswith("down_blocks.0.") for name in names)
    assert planned(made, **options) == names
    options["lora_layers_pattern"] = ["attentions"]
    names = names_in(train(made, tmp_path / "b", **options))
    assert all(".attentions.0." in name for name in names)
    assert len({name.partition(".attentions.")[0] for name in names}) > 1
    assert planned(made, **options) == names


def test_an_export_never_holds_nan(tiny, tmp_path):
    from safetensors.torch import save_file

    from emloc.errors import NumericalError
    from emloc_diffusion.export import export_adapter

    folder = train((tiny.base, tiny.pictures), tmp_path / "a")
    for path in folder.glob("pytorch_lora_weights*.safetensors"):
        path.unlink()
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, weights)
    for kind in ("diffusers", "kohya"):
        with pytest.raises(NumericalError, match="is NaN or infinite in float32"):
            export_adapter(folder, "unet", [kind], tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))
