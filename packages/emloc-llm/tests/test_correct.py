"""Correction of adapters on disk: the formula, the stock loader, and what is refused."""

import json
import shutil

import pytest
import torch
from chosen_limit import chosen_limit
from llm_reference import load, logits
from peft import PeftModel
from safetensors.torch import load_file, save_file

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.errors import CheckpointError, ConfigError, MismatchError, NumericalError
from emloc.testing.resealed import resealed
from emloc_llm.example import write_model

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"lora_rank_pattern": {"q_proj": 2}, "lora_alpha_pattern": {"mlp.*": 5}},
    "dora": {"use_dora": True},
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tiny, tmp_path_factory):
    """An adapter of each kind, corrected without limit."""
    root = tmp_path_factory.mktemp(request.param)
    adapter = emloc.train(
        output_dir=root / "adapter",
        **{**tiny.train_options, "max_steps": 2, **KINDS[request.param]},
    )
    corrected = emloc.correct(
        output_dir=root / "corrected", limit="none",
        **{**tiny.correct_options, "adapter": str(adapter)},
    )  # fmt: skip
    return request.param, adapter, corrected


def peft_layers(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def test_acts_on_the_base_as_it_did_on_the_emulator(kind, tiny):
    """On the row space of A: the base's layer with B_c gives what the emulator's gave with B."""
    _, adapter, corrected = kind
    on_emulator = peft_layers(PeftModel.from_pretrained(load(tiny.emulator), adapter).eval())
    on_base = peft_layers(PeftModel.from_pretrained(load(tiny.base), corrected).eval())
    assert on_base.keys() == on_emulator.keys()
    assert len(on_base) == 21
    for layer, module in on_base.items():
        a = module.lora_A["default"].weight
        x = torch.randn(5, a.shape[0]) @ a  # inputs that the LoRA reads in full
        with torch.no_grad():
            ours, wanted = module(x), on_emulator[layer](x)
        scale = wanted.abs().max()
        torch.testing.assert_close(ours / scale, wanted / scale, rtol=0, atol=2e-4)
        assert torch.equal(a, on_emulator[layer].lora_A["default"].weight)
    plain = peft_layers(PeftModel.from_pretrained(load(tiny.base), adapter).eval())
    x = torch.randn(5, 4) @ plain["model.layers.0.mlp.down_proj"].lora_A["default"].weight
    with torch.no_grad():
        off = plain["model.layers.0.mlp.down_proj"](x) - on_base["model.layers.0.mlp.down_proj"](x)
    assert off.abs().max() > 0.05  # without the correction it does not


def test_equals_the_float64_formula(kind, tiny):
    name, adapter, corrected = kind
    config = json.loads((adapter / "adapter_config.json").read_text())
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(corrected / "adapter_model.safetensors")
    base, emulator = load(tiny.base), load(tiny.emulator)
    for key in [k for k in before if k.endswith("lora_A.weight")]:
        layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a = before[key].double()
        rank = a.shape[0]
        alpha = 5 if name == "patterns" and "mlp" in layer else config["lora_alpha"]
        scaling = alpha / (rank**0.5 if name == "rslora" else rank)
        e = (emulator.get_submodule(layer).weight.data - base.get_submodule(layer).weight).double()
        up = key.replace("lora_A", "lora_B")
        wanted = before[up].double() + e @ a.T @ torch.linalg.inv(a @ a.T) / scaling
        torch.testing.assert_close(after[up].double(), wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(after[key], before[key])


def test_names_the_original_and_reports_each_layer(kind, tiny):
    _, _, corrected = kind
    config = json.loads((corrected / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny.base)
    manifest = Manifest.read(corrected)
    assert manifest.kind == "corrected_adapter"
    assert len(manifest.layers) == 21
    for report in manifest.layers.values():
        assert report["clipped_share"] == 0
        assert report["residual_after"] < 1e-4 * report["residual_before"]


def test_stock_logits_are_the_ones_we_compute(kind, tiny, batch):
    """`limit=auto` scores candidates with our own streamed forward; PEFT must agree with it."""
    _, adapter, _ = kind
    folder = emloc.correct(
        output_dir=adapter.parent / "auto", **{**tiny.correct_options, "adapter": str(adapter)},
        limit="auto", num_calibration_samples=24,
    )  # fmt: skip
    summary = Manifest.read(folder).summary
    table = summary["calibration_loss"]
    data = {"data 0.25", "data 0.5", "data 0.75", "data 1"}
    assert set(table) == {"0", "0.3", "1", "3", "none"} | data
    assert summary["limit"] == chosen_limit(summary)
    score = {"dataset": str(tiny.data), "model_name_or_path": str(tiny.base), "max_new_tokens": 0}
    uncorrected = emloc.evaluate(adapter=str(adapter), allow_mismatch=True, **score)["loss"]
    chosen = emloc.evaluate(adapter=str(folder), **score)["loss"]
    assert table["0"] == pytest.approx(uncorrected, rel=1e-5)
    assert table[summary["limit"]] == pytest.approx(chosen, rel=1e-5)


def test_data_that_the_lora_has_learnt_are_named(tiny, tmp_path, capsys):
    options = {**tiny.correct_options, "limit": "auto", "num_calibration_samples": 4}
    emloc.correct(output_dir=tmp_path / "learnt", **options)
    said = "trained on the same data"
    assert said in " ".join(capsys.readouterr().err.split())
    others = tmp_path / "others.jsonl"
    others.write_text("".join(tiny.data.read_text().splitlines(keepends=True)[:-1]))
    emloc.correct(output_dir=tmp_path / "unseen", **{**options, "dataset": str(others)})
    assert said not in " ".join(capsys.readouterr().err.split())


def test_limits_scale_back(tiny, tmp_path):
    def residuals(limit):
        folder = emloc.correct(output_dir=tmp_path / limit, limit=limit, **tiny.correct_options)
        layers = Manifest.read(folder).layers.values()
        return [entry["residual_after"] for entry in layers], [e["clipped_share"] for e in layers]

    loose, tight, nothing = residuals("3"), residuals("0.1"), residuals("0")
    assert sum(loose[0]) < sum(tight[0]) < sum(nothing[0])
    assert all(0 <= share <= 1 for share in tight[1])
    assert sum(tight[1]) > sum(loose[1])
    before = load_file(tiny.adapter / "adapter_model.safetensors")
    after = load_file(tmp_path / "0" / "adapter_model.safetensors")
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)


def test_layers_that_stayed_dense_are_left_alone(tiny, tmp_path):
    common = {"dataset": str(tiny.data), "max_length": 96}
    emulator = emloc.compress(
        model_name_or_path=str(tiny.base), output_dir=tmp_path / "e", exclude=["q_proj"], **common
    )
    options = {**tiny.train_options, "emulator": str(emulator), "max_steps": 1}
    adapter = emloc.train(output_dir=tmp_path / "a", **options)
    folder = emloc.correct(
        output_dir=tmp_path / "c",
        limit="none",
        adapter=str(adapter),
        emulator=str(emulator),
        **common,
    )
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(folder / "adapter_model.safetensors")
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if "lora_B" in key and "q_proj" in key} <= same
    assert not any("lora_B" in key and "k_proj" in key for key in same)


def test_an_adapter_of_another_trainer_is_corrected(tiny, tmp_path, batch):
    """Only PEFT's two files, without our manifest."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "a").mkdir(exist_ok=True)
        shutil.copy(tiny.adapter / name, tmp_path / "a" / name)
    options = {**tiny.correct_options, "adapter": str(tmp_path / "a")}
    folder = emloc.correct(output_dir=tmp_path / "c", limit="none", **options)
    one, two = (PeftModel.from_pretrained(load(tiny.base), f) for f in (folder, tiny.corrected))
    assert torch.equal(logits(one, batch), logits(two, batch))


def test_what_peft_says_it_was_trained_on_is_believed(tiny, tmp_path):
    """An adapter of the base itself, without a manifest, is not for this emulator to correct."""
    shutil.copytree(tiny.corrected, tmp_path / "a")
    (tmp_path / "a/emloc.json").unlink()
    with pytest.raises(
        MismatchError, match=r"was trained on .*base according to its adapter_config\.json"
    ):
        emloc.correct(
            output_dir=tmp_path / "c", limit="none",
            **{**tiny.correct_options, "adapter": str(tmp_path / "a")},
        )  # fmt: skip
    shutil.copytree(tiny.adapter, tmp_path / "b")
    (tmp_path / "b/emloc.json").unlink()
    with pytest.raises(MismatchError, match="not corrected; run emloc correct"):
        emloc.merge(
            adapter=str(tmp_path / "b"),
            model_name_or_path=str(tiny.base),
            output_dir=tmp_path / "m",
        )


def test_two_runs_are_byte_identical_and_the_input_is_untouched(tiny, tmp_path):
    before = (tiny.adapter / "adapter_model.safetensors").read_bytes()
    again = emloc.correct(output_dir=tmp_path / "c", limit="none", **tiny.correct_options)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / name).read_bytes() == (tiny.corrected / name).read_bytes()
    assert (tiny.adapter / "adapter_model.safetensors").read_bytes() == before


def edited(source, target, **changes):
    shutil.copytree(source, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(resealed(target))


def test_refusals(tiny, tmp_path):
    def correct(limit="none", **options):
        emloc.correct(output_dir=tmp_path / "x", limit=limit, **{**tiny.correct_options, **options})

    with pytest.raises(MismatchError, match="is already corrected"):
        correct(adapter=str(tiny.corrected))
    other = write_model(tmp_path / "other", seed=9)
    with pytest.raises(MismatchError, match="was built from a model other than"):
        correct(model_name_or_path=str(other))
    emulator = emloc.compress(
        model_name_or_path=str(tiny.base), output_dir=tmp_path / "e", format="low_rank", keep_ratio=0.3,
        dataset=str(tiny.data), max_length=96,
    )  # fmt: skip
    with pytest.raises(MismatchError, match="was trained on"):
        correct(emulator=str(emulator))
    with pytest.raises(ConfigError, match="pass a dataset, or a fixed limit"):
        correct(limit="auto", dataset=None)
    for option, value in (("limit_candidates", [1.0]), ("strength_candidates", [0.5])):
        with pytest.raises(
            ConfigError, match=f"{option} are what limit=auto compares, but limit is fixed"
        ):
            correct(**{option: value})
        with pytest.raises(ConfigError, match=f"{option} are .*, but strength is fixed at 0.5"):
            emloc.correct(
                output_dir=tmp_path / "x", strength=0.5,
                **{**tiny.correct_options, option: value},
            )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        correct(adapter=str(tiny.base))
    for change, message in (
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"bias": "lora_only"}, "trains biases"),
        ({"init_lora_weights": "pissa"}, "changes the emulator's weights"),
        ({"r": 7}, "do not belong together|has rank"),
    ):
        name = "_".join(change)
        with pytest.raises((MismatchError, CheckpointError), match=message):
            correct(adapter=edited(tiny.adapter, tmp_path / name, **change))
    bad = edited(tiny.adapter, tmp_path / "nan")
    tensors = load_file(f"{bad}/adapter_model.safetensors")
    tensors[next(key for key in tensors if "lora_B" in key)][0] = float("nan")
    save_file(tensors, f"{bad}/adapter_model.safetensors")
    resealed(tmp_path / "nan")
    with pytest.raises(NumericalError, match="holds NaN or infinity; training diverged"):
        correct(adapter=bad)
    assert not (tmp_path / "x").exists()
