"""The laws of formats, for core's own and for one of a third party, which is taken through all stages."""

import importlib.metadata
import inspect
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.artefacts.settings import same
from emloc.config import CompressConfig, TrainConfig
from emloc.errors import (
    CheckpointError,
    ConfigError,
    DependencyError,
    MismatchError,
    OutputError,
    PluginError,
)
from emloc.extend.formats import Forms, format_named
from emloc.extend.plugin_options import with_plugin_options
from emloc.extend.plugins import load_plugins
from emloc.formats.abilities import Cuttable
from emloc.formats.coded_low_rank import CODED_LOW_RANK
from emloc.formats.layer_format import (
    DenseLayer,
    Form,
    GroupShape,
    LayerFormat,
    budget_bytes,
    stored_elements,
    tensor_bytes,
)
from emloc.formats.low_rank import LOW_RANK
from emloc.formats.quantized import QUANTIZED
from emloc.formats.quantized_residual import QUANTIZED_RESIDUAL, QuantizedResidual
from emloc.formats.trellis import TRELLIS
from emloc.formats.trellis_residual import TRELLIS_RESIDUAL
from emloc.integrations.bitsandbytes.nf4_format import NF4_FORMAT
from emloc.layers.emulated_layer import EmulatedLayer
from emloc.linalg.gram import Moments

sys.path.insert(0, str(Path(__file__).parent))
import rounded_format

ROUNDED = rounded_format.Rounded()
FORMATS = [
    LOW_RANK, ROUNDED, TRELLIS, TRELLIS_RESIDUAL, QUANTIZED, QUANTIZED_RESIDUAL, CODED_LOW_RANK,
    NF4_FORMAT,
]  # fmt: skip


class Plugin:
    name = "rounded-plugin"

    def load(self):
        return rounded_format


@pytest.fixture
def installed(monkeypatch):
    """The third party's plugin, beside those that are installed."""
    real = importlib.metadata.entry_points

    def entry_points(**asked):
        ours = [Plugin()] if asked == {"group": "emloc"} else []
        return [*real(**asked), *ours] if ours else real(**asked)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


SHAPES = [
    GroupShape(("a",), (14,), 24),
    GroupShape(("a",), (30,), 12),
    GroupShape(("a", "b", "c"), (14, 5, 9), 24),
    GroupShape(("conv",), (16,), 27, (3, 3)),
]


def config_of(**options):
    return CompressConfig(model_name_or_path="m", output_dir="o", dataset="d", **options)


def budget_of(format):
    residual = {"residual_rank": 2} if isinstance(format, QuantizedResidual) else {}
    return config_of(keep_ratio=0.6, **residual)


def fitted(format, shape, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(d, shape.d_in, generator=draw, dtype=dtype) for d in shape.d_out]
    x = torch.randn(60, shape.d_in, generator=draw, dtype=dtype)
    moments = Moments(format.side(shape), shape.owner)
    moments.fold(x if moments.side == "input" else x @ torch.cat(weights).T)
    form = format.decide(shape, budget_of(format), dtype.itemsize)
    return weights, form, format.fit(weights, moments, shape, form)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_laws(format, shape):
    assert isinstance(format, LayerFormat)
    weights, form, outcome = fitted(format, shape)
    stored = {(one.layer, one.name): one for one in format.stored(shape, form)}
    assert outcome.tensors.keys() == stored.keys()
    for key, tensor in outcome.tensors.items():
        assert tuple(tensor.shape) == stored[key].shape
        assert tensor.dtype == (stored[key].dtype or torch.float32)
    written = sum(tensor.numel() * tensor.element_size() for tensor in outcome.tensors.values())
    assert tensor_bytes(shape, form, 4) == written
    assert written <= budget_bytes(shape, budget_of(format), 4)
    assert stored_elements(shape, form) == sum(t.numel() for t in outcome.tensors.values())
    json.dumps(form.as_json())
    assert set(form.sizes) == set(format.size_names)
    columns = torch.randn(shape.d_in, 3, dtype=torch.float64)
    for layer, weight in zip(shape.layers, weights):
        operator = format.operator(shape, form, layer, lambda *key: outcome.tensors[key])
        dense = operator.dense(torch.float64)
        assert dense.shape == weight.shape
        torch.testing.assert_close(operator @ columns, dense @ columns)
        assert (dense - weight).norm() < weight.norm()  # it stands for that weight and no other


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_modules_compute_what_the_operator_says(format, shape):
    _, form, outcome = fitted(format, shape)
    dense = [
        DenseLayer(name, shape.d_in, d_out, True, torch.float32, torch.device("cpu"))
        for name, d_out in zip(shape.layers, shape.d_out)
    ]
    modules = dict(zip(shape.layers, format.modules(dense, form)))
    for (layer, name), tensor in outcome.tensors.items():
        modules[layer].load_state_dict({name: tensor}, strict=False)
    x = torch.randn(7, shape.d_in)
    for layer, module in modules.items():
        assert isinstance(module, EmulatedLayer)
        assert isinstance(module, nn.Linear)
        assert not any(p.requires_grad for p in module.parameters())
        own = {name for name, _ in module.named_parameters() if name != "bias"}
        assert own == {name for owner, name in outcome.tensors if owner == layer}
        nn.init.ones_(module.bias)
        operator = format.operator(shape, form, layer, lambda *key: outcome.tensors[key])
        expected = x @ operator.dense(torch.float32).T + 1
        x.requires_grad_()
        y = module(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        [gradient] = torch.autograd.grad(y.sin().sum(), x)
        wanted = y.detach().cos() @ operator.dense(torch.float32)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)
        x = x.detach()


@pytest.mark.parametrize(
    "format", [f for f in FORMATS if f is not ROUNDED], ids=lambda format: format.name
)
def test_convolutions_compute_what_the_operator_says(format):
    shape = SHAPES[3]
    _, form, outcome = fitted(format, shape)
    conv = nn.Conv2d(3, 16, 3, stride=2, padding=1, padding_mode="reflect")
    layer = DenseLayer("conv", 27, 16, True, torch.float32, torch.device("cpu"), conv)
    [module] = format.modules([layer], form)
    tensors = {name: tensor for (_, name), tensor in outcome.tensors.items()}
    module.load_state_dict({**tensors, "bias": conv.bias.detach()})
    operator = format.operator(shape, form, "conv", lambda *key: outcome.tensors[key])
    conv.weight.data = operator.dense(torch.float32).view(16, 3, 3, 3)
    x = torch.randn(2, 3, 8, 10, requires_grad=True)
    y, expected = module(x), conv(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(expected.square().sum(), x),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip


def test_a_smaller_form_is_the_leading_part_of_a_larger_one():
    assert isinstance(LOW_RANK, Cuttable)
    assert not isinstance(ROUNDED, Cuttable)
    weights, form, outcome = fitted(LOW_RANK, SHAPES[0], torch.float64)
    small = form.with_size(LOW_RANK.unit, 3)
    _, x = weights, outcome.tensors
    parts = {
        (s.layer, s.name): x[s.layer, s.name][tuple(slice(n) for n in s.shape)]
        for s in LOW_RANK.stored(SHAPES[0], small)
    }
    operator = LOW_RANK.operator(SHAPES[0], small, "a", lambda *key: parts[key])
    assert torch.linalg.matrix_rank(operator.dense(torch.float64)) == 3
    # Orthonormal columns: what is left out is orthogonal to what is kept.
    whole = LOW_RANK.operator(SHAPES[0], form, "a", lambda *key: x[key]).dense(torch.float64)
    kept = operator.dense(torch.float64)
    torch.testing.assert_close(kept.T @ (whole - kept), torch.zeros(24, 24).double())


def test_formats_are_registered_by_name(installed):
    formats = load_plugins().formats
    assert list(formats) == [
        "low_rank", "trellis", "trellis_residual", "quantized", "quantized_residual", "coded_low_rank",
        "nf4", "rounded",
    ]  # fmt: skip
    assert formats["low_rank"].plugin == "emloc"
    assert formats["rounded"].plugin == "rounded-plugin"
    assert format_named("rounded").name == "rounded"
    assert Forms().of_config({"layers": ["a"], "rank": 3}).as_json() == {"rank": 3}
    form = Forms().of_config({"layers": ["a"], "format": "rounded"})
    assert form.as_json() == {"format": "rounded"}


def test_an_unknown_format_is_one_sentence():
    with pytest.raises(PluginError, match=r"offers the format 'low_rnk' .* Did you mean low_rank"):
        format_named("low_rnk")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return load_plugins().families["llm"].load().write_example(
        tmp_path_factory.mktemp("llm"), seed=0
    )  # fmt: skip


def test_options_that_a_format_does_not_have_are_refused(installed, llm, tmp_path):
    options = {**llm, "output_dir": tmp_path / "e", "format": "rounded"}
    with pytest.raises(ConfigError, match="rank_pattern means nothing to format=rounded"):
        emloc.compress(rank_pattern={"q_proj": 3}, **options)
    with pytest.raises(ConfigError, match="format=rounded cannot"):
        emloc.compress(keep_ratio_allocation="error", **options)
    with pytest.raises(ConfigError, match="16 bits are more than its share"):
        emloc.compress(keep_ratio=0.4, **options)


def test_a_format_in_under_80_lines_goes_through_all_stages(installed, llm, tmp_path):
    lines = inspect.getsource(rounded_format.Rounded) + inspect.getsource(
        rounded_format.RoundedLinear
    )
    assert len(lines.splitlines()) < 80
    data = {k: v for k, v in llm.items() if k != "model_name_or_path"}
    emulator = emloc.compress(
        output_dir=tmp_path / "e", format="rounded", keep_ratio=0.6, dtype="float32", **llm
    )
    manifest = Manifest.read(emulator)
    base = Checkpoint.open(llm["model_name_or_path"])
    written = Checkpoint.open(emulator)
    config = json.loads((emulator / "config.json").read_text())
    assert manifest.settings["format"] == "rounded"
    for group in config["quantization_config"]["groups"]:
        assert group == {"layers": group["layers"], "format": "rounded"}
        for layer in group["layers"]:
            stored, weight = written.read(f"{layer}.rounded"), base.read(f"{layer}.weight")
            assert torch.equal(stored, weight.bfloat16())
            assert f"{layer}.weight" not in written.tensors
    assert emloc.verify(path=emulator)["kind"] == "emulator"

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(emulator)
    held = [m for m in model.modules() if isinstance(m, rounded_format.RoundedLinear)]
    assert len(held) == sum(len(entry["layers"]) for entry in manifest.layers.values())
    assert all(module.rounded.dtype == torch.bfloat16 for module in held)

    adapter = emloc.train(
        emulator=str(emulator), output_dir=tmp_path / "a", max_steps=3, lora_r=3,
        learning_rate=1e-2, **data,
    )  # fmt: skip
    corrected = emloc.correct(
        adapter=str(adapter),
        emulator=str(emulator),
        output_dir=tmp_path / "c",
        limit="none",
        **data,
    )
    for name, entry in Manifest.read(corrected).layers.items():
        assert entry["residual_before"] > 0, name
        assert entry["residual_after"] < 1e-2 * entry["residual_before"], name
    merged = emloc.merge(adapter=str(corrected), output_dir=tmp_path / "m")
    assert emloc.verify(path=merged)["kind"] == "merged_model"

    plan = emloc.plan(model_name_or_path=llm["model_name_or_path"], format="rounded",
                      keep_ratio=0.6, max_length=96)  # fmt: skip
    stages = plan["stages"]
    assert stages["compress"]["disk_bytes"]["lines"]["emulator"] == sum(
        math.prod(info.shape) * info.dtype.itemsize for info in written.tensors.values()
    )
    lora = plan["beside"]["LoRA on the base"]["device_bytes"]["lines"]
    train = stages["train"]["device_bytes"]["lines"]
    assert train["weights"] < lora["weights"]


def test_what_a_module_makes_while_it_runs_is_planned(installed, tmp_path):
    """The closed form of a step against the same step on fake tensors."""
    from emloc.compression.groups import Group, group_shape
    from emloc.planning.described import describe
    from emloc.planning.family import traced_loss
    from emloc.planning.layers import layer_shapes, planned_layers
    from emloc.planning.step import Precision, StepOptions
    from emloc.planning.trace import trace_step
    from emloc_llm.example import write_model

    folder = write_model(tmp_path, hidden_size=256, intermediate_size=700, num_hidden_layers=2)
    checkpoint, family, model = describe(str(folder))
    config = with_plugin_options(TrainConfig)(
        output_dir="unused", max_length=16, lora_r=3, per_device_train_batch_size=1
    )
    batch = family.planned_batch(checkpoint, config, 1)
    shapes = layer_shapes(model)
    totals = []
    for emulated in (False, True):
        shaped = [group_shape(names, shapes.__getitem__) for names in family.layer_groups(model)]
        groups = [Group(shape, Form(ROUNDED)) for shape in shaped] if emulated else []
        adapted = family.adapted_layers(model, config)
        layers = planned_layers(model, shapes, groups, adapted, config, 4)
        planned = family.step_sizes(model, layers, batch, StepOptions(Precision(4)))
        model_of_training = family.trainable(checkpoint, groups, config)
        traced = trace_step(model_of_training, batch, traced_loss(family), autocast=False)
        totals.append((planned.phases["backward"].total, traced.phases["backward"].total))
    (dense, dense_traced), (rounded, rounded_traced) = totals
    widest = 256 * 700 * 4
    assert rounded - dense == pytest.approx(widest, rel=0.3)
    # The largest moment of the trace may be another, at which no layer runs.
    assert 0 <= rounded_traced - dense_traced <= widest * 1.3


def test_an_emulator_without_a_tensor_is_refused(llm, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    low_rank = {"output_dir": tmp_path / "e", "format": "low_rank", **llm}
    emulator = emloc.compress(**low_rank)
    settings = Manifest.read(emulator).settings
    assert "format" not in settings  # as in emulators of before there were others
    assert settings["keep_ratio"] == 0.4
    assert emloc.compress(**low_rank, keep_ratio=0.4) == emulator  # complete already
    with pytest.raises(OutputError, match="format not given, now auto"):
        emloc.compress(**{**low_rank, "format": "auto"})
    [path] = [p for p in emulator.glob("*.safetensors") if "00001" in p.name]
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith(".left"))
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    index = emulator / "model.safetensors.index.json"
    named = json.loads(index.read_text())
    del named["weight_map"][lost]
    index.write_text(json.dumps(named))
    with pytest.raises(CheckpointError, match=lost):
        AutoModelForCausalLM.from_pretrained(emulator)


def test_the_default_chooses_bits_and_says_its_budget(llm, tmp_path):
    emulator = emloc.compress(output_dir=tmp_path / "e", **llm)
    manifest = Manifest.read(emulator)
    assert (manifest.settings["format"], manifest.settings["bits_per_weight"]) == ("auto", 4.2)
    assert "keep_ratio" not in manifest.settings
    assert {entry["format"] for entry in manifest.layers.values()} <= {
        "trellis",
        "trellis_residual",
        "quantized",
    }
    assert 4.0 < manifest.summary["predicted_error"]["bits_per_weight"] <= 4.2
    plan = emloc.plan(model_name_or_path=llm["model_name_or_path"], max_length=96)
    assert (plan["format"], plan["sized_by"], plan["keep_ratio"]) == (
        "auto", "bits_per_weight 4.2", None)  # fmt: skip
    assert plan["bits_per_weight"] == pytest.approx(4.2, rel=0.05)


def test_settings_of_before_that_others_decided_are_the_same():
    before = {"format": "quantized", "bits": 4, "keep_ratio": 0.4}
    assert same(before, {"format": "quantized", "bits": 4})
    assert not same({**before, "keep_ratio": 0.3}, {"format": "quantized", "bits": 4})


def test_nf4_is_bitsandbytes_own_layer():
    import bitsandbytes

    weights, form, outcome = fitted(NF4_FORMAT, GroupShape(("a",), (30,), 70))
    layer = DenseLayer("a", 70, 30, False, torch.float32, torch.device("cpu"))
    [module] = NF4_FORMAT.modules([layer], form)
    module.load_state_dict({name: tensor for (_, name), tensor in outcome.tensors.items()})
    theirs = bitsandbytes.nn.Linear4bit(70, 30, bias=False, quant_type="nf4")
    theirs.load_state_dict({"weight": weights[0]})
    x = torch.randn(5, 70)
    torch.testing.assert_close(module(x), theirs.to("cpu")(x), rtol=1e-4, atol=1e-4)
    for dtype in (torch.bfloat16, torch.float16):
        assert module.to(dtype)(x.to(dtype)).dtype == dtype


def test_nf4_without_bitsandbytes_is_one_sentence(monkeypatch, llm, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(DependencyError, match=r"pip install 'emloc\[bitsandbytes\]'"):
        emloc.compress(output_dir=tmp_path / "e", format="nf4", **llm)


@pytest.mark.parametrize(("format", "sizes"), [
    (TRELLIS, (5, 64)), (TRELLIS, (2, 0)), (TRELLIS, (0, 64)), (QUANTIZED, (1, 64)),
    *((f, (2, 64, *more)) for f in (TRELLIS_RESIDUAL, QUANTIZED_RESIDUAL)
      for more in ((4, 5), (0, 8), (-1, 8), (99, 8))),
    (TRELLIS_RESIDUAL, (9, 64, 4, 8)), (QUANTIZED_RESIDUAL, (2, -1, 4, 8)),
    (CODED_LOW_RANK, (4, 5)), (CODED_LOW_RANK, (0, 4)), (CODED_LOW_RANK, (99, 4)),
])  # fmt: skip
def test_sizes_of_a_config_that_no_compression_writes_are_refused(format, sizes):
    """Before a module is made, and not with Python's own words."""
    form = Form(format, dict(zip(format.size_names, sizes, strict=True)))
    layer = DenseLayer("a", 48, 32, True, torch.float32, torch.device("cpu"))
    with pytest.raises(MismatchError, match="not a format; compress the base model again"):
        format.modules([layer], form)
