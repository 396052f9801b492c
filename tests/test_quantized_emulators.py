"""Emulators of few bits through all stages, in every family, as a user has them."""

import json

import pytest
import torch

import emloc
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.errors import ConfigError
from emloc.extend.plugins import family_named
from emloc.layers.quantized_layers import QuantizedConv2d, QuantizedLinear
from emloc.testing import pretend_device


@pytest.fixture(scope="module", params=["llm", "vlm", "diffusion"])
def family(request):
    return family_named(request.param)


@pytest.fixture(scope="module")
def example(family, tmp_path_factory):
    return family.write_example(tmp_path_factory.mktemp(family.name), seed=0)


@pytest.fixture(scope="module")
def emulator(example, tmp_path_factory):
    root = tmp_path_factory.mktemp("emulators")
    return emloc.compress(
        output_dir=root / "four", format="quantized", bits=4, group_size=32, **example
    )


def test_codes_stand_for_the_weights(family, example, emulator):
    """Every layer against the base's weight, by the tensors on disk and by the loaded model."""
    base = family.load(native(family, example["model_name_or_path"]), "float32", "cpu")
    held = family.load(native(family, emulator), "float32", "cpu")
    manifest = Manifest.read(emulator)
    assert manifest.settings["format"] == "quantized"
    assert manifest.settings["bits"] == 4
    layers = [name for entry in manifest.layers.values() for name in entry["layers"]]
    kinds = {type(held.get_submodule(name)) for name in layers}
    assert kinds <= {QuantizedLinear, QuantizedConv2d}
    assert family.name != "diffusion" or QuantizedConv2d in kinds
    for name in layers:
        weight, stood = (m.get_submodule(name).weight.detach() for m in (base, held))
        weight = weight.T if weight.shape != stood.shape else weight
        error = (stood + 0 - weight).norm() / weight.norm()
        assert error < 0.25, name  # a grid of 16 levels, moved by feedback
    for entry in manifest.layers.values():
        assert entry["bits"] == 4
        assert 0 < entry["relative_error"] < 0.2
    assert all(p.dtype != torch.uint8 or not p.requires_grad for p in held.parameters())
    half = held.to(torch.bfloat16)
    first = half.get_submodule(layers[0])
    assert first.weight.dtype == torch.bfloat16
    assert first.codes.dtype == torch.uint8
    assert first.largest_scales.dtype == torch.int32


def native(family, folder):
    from emloc.extend.capabilities import native_of

    return native_of(family, Checkpoint.open(str(folder)))


def test_fewer_bytes_and_a_smaller_error_than_low_rank(example, emulator, tmp_path):
    quantized = Manifest.read(emulator)
    share = quantized.summary["emulator_bytes"] / quantized.summary["base_bytes"]
    low_rank = Manifest.read(
        emloc.compress(output_dir=tmp_path / "low", format="low_rank", keep_ratio=0.6, **example)
    )
    assert share < low_rank.summary["emulator_bytes"] / low_rank.summary["base_bytes"]

    def mean(manifest):
        errors = [entry["relative_error"] for entry in manifest.layers.values()]
        return sum(errors) / len(errors)

    assert mean(quantized) < mean(low_rank)


def test_all_stages(example, emulator, tmp_path):
    data = {key: value for key, value in example.items() if key != "model_name_or_path"}
    assert emloc.verify(path=emulator)["kind"] == "emulator"
    adapter = emloc.train(
        emulator=str(emulator), output_dir=tmp_path / "adapter", max_steps=2, logging_steps=1,
        save_steps=1, learning_rate=1e-2, lora_r=3, **data,
    )  # fmt: skip
    corrected = emloc.correct(
        adapter=str(adapter), emulator=str(emulator), output_dir=tmp_path / "corrected",
        limit="none", **data,
    )  # fmt: skip
    for name, entry in Manifest.read(corrected).layers.items():
        assert entry["residual_before"] > 0, name
        assert entry["residual_after"] < 1e-2 * entry["residual_before"], name
    assert Adapter.open(str(corrected)).layers
    merged = emloc.merge(adapter=str(corrected), output_dir=tmp_path / "merged")
    assert emloc.verify(path=merged)["kind"] == "merged_model"


FORMS = {
    "trellis": {"format": "trellis", "bits": 2},
    "residual": {"format": "quantized", "bits": 2, "residual_rank": 3, "factor_bits": 8},
    "factors of few bits": {"format": "low_rank", "factor_bits": 4, "keep_ratio": 0.15},
    "nf4": {"format": "nf4"},
    "auto": {"format": "auto", "bits_per_weight": 4.5},
}


MOST = ["(down_blocks|mid_block|up_blocks.0).*", "up_blocks.1.(attentions.0|resnets.0).*"]
FEW_LAYERS = {"diffusion": {"exclude": MOST}}
"""Rounding is many small operations, which take long in many small layers."""


CASES = [
    *(("llm", form) for form in FORMS),
    ("vlm", "auto"),
    *(("diffusion", form) for form in FORMS),  # convolutions
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def other(request, tmp_path_factory):
    """An emulator of another form, and its options."""
    name, form = request.param
    root = tmp_path_factory.mktemp("other")
    few = {"num_calibration_samples": 4, **FEW_LAYERS.get(name, {})}
    options = {**family_named(name).write_example(root, seed=0), **few, **FORMS[form]}
    return emloc.compress(output_dir=root / "e", **options), options


def test_other_forms_through_all_stages(other, tmp_path):
    folder, options = other
    own = {name for form in FORMS.values() for name in form}
    own |= {"exclude", "num_calibration_samples"}
    data = {name: value for name, value in options.items() if name not in own}
    test_all_stages(data, folder, tmp_path)


def test_bits_per_weight_are_what_is_stored(tmp_path):
    example = family_named("llm").write_example(tmp_path, seed=0)
    options = {**example, **FORMS["auto"]}
    folder = emloc.compress(output_dir=tmp_path / "e", **options)
    again = emloc.compress(output_dir=tmp_path / "again", **options)
    assert Manifest.read(again).files == Manifest.read(folder).files
    written, manifest = Checkpoint.open(str(folder)), Manifest.read(folder)
    layers = {name for entry in manifest.layers.values() for name in entry["layers"]}
    layers |= {n for n, why in manifest.kept_dense.items() if why.startswith("its bytes")}
    held = sum(
        info.nbytes
        for name, info in written.tensors.items()
        if name.rpartition(".")[0] in layers and not name.endswith(".bias")
    )
    weights = sum(sum(entry["d_out"]) * entry["d_in"] for entry in manifest.layers.values())
    predicted = manifest.summary["predicted_error"]
    assert predicted["bits_per_weight"] <= options["bits_per_weight"]
    assert predicted["bits_per_weight"] > 0.9 * options["bits_per_weight"]
    if len(layers) == len(manifest.layers):  # none stays dense
        assert 8 * held / weights == pytest.approx(predicted["bits_per_weight"], rel=1e-6)
    sizes = {(entry["bits"], entry["group_size"]) for entry in manifest.layers.values()}
    assert len(sizes) > 1


def test_reruns_give_the_same_bytes(example, emulator, tmp_path):
    again = emloc.compress(
        output_dir=tmp_path / "again", format="quantized", bits=4, group_size=32, **example
    )
    assert Manifest.read(again).files == Manifest.read(emulator).files


@pytest.mark.parametrize(
    ("ratio", "sizes"),
    [(0.3, (8, 32)), (0.2, (4, 32)), (0.13, (4, 128)), (0.11, (3, 32)), (0.07, (2, 64))],
)
def test_a_share_of_bytes_buys_bits(ratio, sizes, tmp_path):
    """A share of 0.3 of float32 weights is 9.6 bits, for codes, scales and zeros."""
    from emloc.config import CompressConfig
    from emloc.formats.layer_format import GroupShape
    from emloc.formats.quantized import QUANTIZED

    config = CompressConfig(
        model_name_or_path="m", output_dir="o", dataset="d", format="quantized", keep_ratio=ratio
    )
    form = QUANTIZED.decide(GroupShape(("a",), (512,), 512), config, 4)
    assert (form.sizes["bits"], form.sizes["group_size"]) == sizes


def test_plans_know_the_bytes(tmp_path):
    example = family_named("llm").write_example(tmp_path, seed=0)
    emulator = emloc.compress(output_dir=tmp_path / "e", format="quantized", bits=3, **example)
    plan = emloc.plan(
        model_name_or_path=example["model_name_or_path"], format="quantized", bits=3, max_length=96
    )
    written = Checkpoint.open(str(emulator))
    assert plan["stages"]["compress"]["disk_bytes"]["lines"]["emulator"] == sum(
        info.nbytes for info in written.tensors.values()
    )


def test_bits_of_another_format_are_refused(tmp_path):
    example = family_named("llm").write_example(tmp_path, seed=0)
    with pytest.raises(ConfigError, match="bits means nothing to format=low_rank"):
        emloc.compress(output_dir=tmp_path / "e", format="low_rank", bits=4, **example)
    with pytest.raises(ConfigError, match="rank_pattern means nothing to format=quantized"):
        emloc.compress(
            output_dir=tmp_path / "e", format="quantized", rank_pattern={"q_proj": 3}, **example
        )


def test_an_emulator_loads_with_stock_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    example = family_named("llm").write_example(tmp_path, seed=0)
    emulator = emloc.compress(output_dir=tmp_path / "e", format="quantized", bits=8, **example)
    model = AutoModelForCausalLM.from_pretrained(emulator, dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(example["model_name_or_path"])
    ids = torch.arange(12)[None]
    with torch.no_grad():
        near, logits = model(ids).logits.float(), base(ids).logits
    assert (near - logits).norm() < 0.1 * logits.norm()
    config = json.loads((emulator / "config.json").read_text())["quantization_config"]
    assert {group["format"] for group in config["groups"]} == {"quantized"}
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(ids).logits.float(), near)


@pytest.mark.parametrize("name", ["llm", "diffusion"])  # linear layers alone, and convolutions
def test_on_the_pretended_device(name, tmp_path):
    """The same codes, and gradients of what enters layers through them."""
    family = family_named(name)
    example = family.write_example(tmp_path / "example", seed=0)
    few = {**example, "num_calibration_samples": 2, **FEW_LAYERS.get(name, {})}
    sizes = {"format": "quantized", "bits": 4, "group_size": 32}
    here = emloc.compress(output_dir=tmp_path / "here", device="cpu", **sizes, **few)

    def gradient(device):
        held = family.load(native(family, here), "float32", device)
        layer = next(m for m in held.modules() if isinstance(m, QuantizedLinear))
        assert {p.device.type for p in layer.parameters()} == {device}
        x = torch.ones(2, layer.in_features, device=device, requires_grad=True)
        layer(x).square().sum().backward()
        return x.grad.cpu()

    with pretend_device() as card:
        there = emloc.compress(output_dir=tmp_path / "there", device="cuda", **sizes, **few)
        on_card = gradient("cuda")
        assert card.peak_bytes > 0
    assert Manifest.read(here).files == Manifest.read(there).files
    torch.testing.assert_close(on_card, gradient("cpu"), rtol=1e-4, atol=1e-4)


def test_prices_are_kept_until_the_emulator_is_whole(tmp_path, monkeypatch):
    """Killed behind the last shard, and continued where prices would come out otherwise."""
    from emloc.compression import menu_choice
    from emloc.compression.emulator_folder import EmulatorFolder

    example = family_named("llm").write_example(tmp_path, seed=0)
    options = {**example, "format": "auto", "bits_per_weight": 3.5}
    whole = emloc.compress(output_dir=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(
            EmulatorFolder, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            emloc.compress(output_dir=tmp_path / "again", **options)
    monkeypatch.setattr(menu_choice, "trellis_error", lambda *given: 1.0)
    again = emloc.compress(output_dir=tmp_path / "again", **options)
    assert Manifest.read(again).files == Manifest.read(whole).files
    assert (again / "config.json").read_bytes() == (whole / "config.json").read_bytes()


@pytest.mark.parametrize("title", ["price", "compress"])
def test_auto_goes_on_where_it_was_stopped(title, tmp_path, monkeypatch):
    """In either pass, with the same bytes."""
    from emloc.compression import fitting, menu_choice
    from emloc.compression.one_pass import stream_moments

    example = family_named("llm").write_example(tmp_path, seed=0)
    options = {**example, "format": "auto", "bits_per_weight": 3.5}
    whole = emloc.compress(output_dir=tmp_path / "whole", **options)
    asked = []

    def stopping(stream, plan, batches, done, what, finish, *more):
        def stop(passed):
            asked.append((what, passed.block))
            if what == title and passed.block.endswith(".1"):
                raise KeyboardInterrupt
            finish(passed)

        stream_moments(stream, plan, batches, done, what, stop, *more)

    def counting(stream, plan, batches, done, what, finish, *more):
        def count(passed):
            asked.append((what, passed.block))
            finish(passed)

        stream_moments(stream, plan, batches, done, what, count, *more)

    for module in (fitting, menu_choice):
        monkeypatch.setattr(module, "stream_moments", stopping)
    with pytest.raises(KeyboardInterrupt):
        emloc.compress(output_dir=tmp_path / "again", **options)
    assert not (tmp_path / "again").exists()
    for module in (fitting, menu_choice):
        monkeypatch.setattr(module, "stream_moments", counting)
    first = list(asked)
    asked.clear()
    again = emloc.compress(output_dir=tmp_path / "again", **options)
    finished = {pair for pair in first if not (pair[0] == title and pair[1].endswith(".1"))}
    assert finished.isdisjoint(asked)
    assert Manifest.read(again).files == Manifest.read(whole).files
    assert not list(again.glob("menu-*"))


def test_auto_says_what_cannot_be(tmp_path):
    example = family_named("llm").write_example(tmp_path, seed=0)
    auto = {**example, "output_dir": tmp_path / "e", "format": "auto"}
    with pytest.raises(ConfigError, match="smallest forms take 1.* but the budget is 1.00; raise"):
        emloc.compress(bits_per_weight=1.0, **auto)
    with pytest.raises(
        ConfigError, match="bits means nothing to format=auto, .* pass format=trellis or quantized"
    ):
        emloc.compress(bits=3, **auto)
    with pytest.raises(ConfigError, match="rank_pattern means .* pass format=low_rank"):
        emloc.compress(rank_pattern={"q_proj": 3}, **example, output_dir=tmp_path / "e")
    with pytest.raises(ConfigError, match="leave keep_ratio_allocation out"):
        emloc.compress(keep_ratio_allocation="error", **auto)
    with pytest.raises(ConfigError, match="keep_ratio and bits_per_weight both size"):
        emloc.compress(keep_ratio=0.3, bits_per_weight=3.0, **auto)
    with pytest.raises(ConfigError, match="keep_ratio and bits both size"):
        emloc.compress(keep_ratio=0.3, bits=3, **{**auto, "format": "quantized"})


def test_plans_know_the_bytes_of_auto(tmp_path):
    example = family_named("llm").write_example(tmp_path, seed=0)
    auto = {"format": "auto", "bits_per_weight": 3.5}
    emulator = emloc.compress(output_dir=tmp_path / "e", **auto, **example)
    plan = emloc.plan(model_name_or_path=example["model_name_or_path"], max_length=96, **auto)
    written = sum(info.nbytes for info in Checkpoint.open(str(emulator)).tensors.values())
    planned = plan["stages"]["compress"]["disk_bytes"]["lines"]["emulator"]
    assert planned == pytest.approx(written, rel=0.05)


def test_a_plan_that_chooses_knows_bits(tmp_path):
    """A budget in bits stays as it was asked for; else the plan chooses a share, of auto's forms too."""
    example = family_named("llm").write_example(tmp_path, seed=0)
    asked = {"model_name_or_path": example["model_name_or_path"], "max_length": 96}
    given = emloc.plan(format="auto", bits_per_weight=3.5, memory="1GiB", **asked)
    assert given["fits"]
    assert given["sized_by"] == "bits_per_weight 3.5"
    assert given["bits_per_weight"] == pytest.approx(3.5, rel=0.05)
    free = emloc.plan(format="auto", memory="1GiB", **asked)
    assert free["sized_by"] == f"keep_ratio {free['keep_ratio']:g}"
    assert free["fits"]
    fixed = emloc.plan(format="quantized", bits=4, memory="1GiB", **asked)
    assert fixed["sized_by"] == "bits 4"
    nothing = emloc.plan(format="auto", memory="1MiB", **asked)
    assert not nothing["fits"]
    emulator = emloc.compress(
        output_dir=tmp_path / "e", format="auto", bits_per_weight=3.5, memory="2GiB", **example
    )
    assert Manifest.read(emulator).settings["bits_per_weight"] == 3.5
