"""Plans of small language models against what the stages then take, write and count."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from warm_python import run_python

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.config import PlanConfig, build
from emloc.errors import CheckpointError, ConfigError, OutputError
from emloc.extend.plugin_options import with_plugin_options
from emloc.integrations.transformers import family as transformers_family
from emloc.machine.remembered import Remembered
from emloc.planning import fitting
from emloc.planning.fitting import fit
from emloc.planning.ledger import total
from emloc.planning.live import LiveBytes
from emloc.planning.setting import Setting
from emloc.planning.subject import Subject
from emloc.stages.plan import make_memory_plan
from emloc.stages.registry import planned_stages
from emloc_llm.example import write_model

OPTIONS = with_plugin_options(PlanConfig)


def config_of(**options):
    return build(OPTIONS, {"max_length": 96, "format": "low_rank", **options}, "plan")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A model's config and nothing else."""
    folder = write_model(tmp_path_factory.mktemp("bare"), hidden_size=96, num_hidden_layers=5)
    (folder / "model.safetensors").unlink()
    return str(folder)


@pytest.fixture(scope="module")
def planned(tiny):
    return make_memory_plan(config_of(model_name_or_path=str(tiny.base), keep_ratio=0.5)).setting


def test_parameters_and_bytes_are_those_of_the_files(tiny, planned):
    manifest = Manifest.read(tiny.emulator)
    assert planned.subject.parameters * 4 == manifest.summary["base_bytes"]
    assert planned.subject.bytes == manifest.summary["base_bytes"]
    assert planned.compress().disk["emulator"] == manifest.summary["emulator_bytes"]
    for group in planned.emulator.groups:
        entry = manifest.layers[group.owner]
        assert entry["layers"] == list(group.layers)
        assert entry["rank"] == group.form.sizes["rank"]
    assert len(planned.emulator.groups) == len(manifest.layers)


def test_the_lora_is_the_adapter_that_training_writes(tiny):
    from safetensors.torch import load_file

    config = config_of(model_name_or_path=str(tiny.base), keep_ratio=0.5, lora_r=4)
    lines = make_memory_plan(config).setting.train().device
    adapter = load_file(tiny.adapter / "adapter_model.safetensors")
    assert lines["LoRA"] == sum(value.numel() * 4 for value in adapter.values())
    summary = Manifest.read(tiny.adapter).summary
    assert lines["weights"] + lines["LoRA"] == summary["train_weight_bytes"]
    # The Trainer's own file, which torch.save wrote; tensors alone are read from it, no pickled code.
    state = torch.load(tiny_optimizer(tiny), weights_only=True)["state"]
    held = [v for entry in state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
    assert lines["optimiser"] == sum(v.numel() * v.element_size() for v in held)


SIZES = {
    # as published: SmolLM2-135M and Llama-3.2-1B, whose heads are their embeddings
    134_515_008: {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    },
    1_235_814_400: {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("parameters", SIZES)
def test_tied_weights_count_once(tmp_path, parameters):
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16",
        "tie_word_embeddings": True, **SIZES[parameters],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    subject = Subject.of(str(tmp_path), "auto")
    assert subject.parameters == parameters
    assert subject.bytes == 2 * parameters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modules_that_are_trained_whole_are_counted(tmp_path, tied, dtype):
    """Against stock PEFT's model, its optimiser after a step, and what is written."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    base = write_model(tmp_path / "base", dtype=kind, tie_word_embeddings=tied)
    modules = ["embed_tokens", "lm_head", "post_attention_layernorm"]
    config = config_of(
        model_name_or_path=str(base), lora_r=4, lora_modules_to_save=modules, device="cpu"
    )
    setting = make_memory_plan(config).setting
    row = setting.beside["LoRA on the base"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=kind)
    targets = sorted({name.rpartition(".")[2] for name in setting.subject.adapted(config)})
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, modules_to_save=modules))
    learnt = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    optimiser = torch.optim.AdamW(learnt)
    model(**dict.fromkeys(("input_ids", "labels"), torch.randint(3, 200, (2, 9)))).loss.backward()
    optimiser.step()
    lines = row.device
    assert lines["weights"] == held(frozen)
    assert lines["LoRA"] + lines["modules to save"] == held(learnt)
    assert lines["gradients"] == held(p.grad for p in learnt)
    state = [value for entry in optimiser.state.values() for value in entry.values()]
    assert lines["optimiser"] == held(state)
    model.save_pretrained(tmp_path / "a")
    written = Checkpoint.from_files("a", tmp_path / "a", {}, {"adapter_model.safetensors": None})
    assert row.disk["adapter"] == sum(info.nbytes for info in written.tensors.values())
    assert setting.learnt == row.disk["adapter"]
    merged = emloc.merge(
        adapter=str(tmp_path / "a"), model_name_or_path=str(base), output_dir=tmp_path / "m"
    )
    stored = sum(info.nbytes for info in Checkpoint.open(merged).tensors.values())
    assert setting.merge().disk["merged model"] == stored


def held(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_allocated_ranks_are_written_wide_and_end_as_small(tiny, tmp_path):
    options = {"model_name_or_path": str(tiny.base), "keep_ratio": 0.5, "max_length": 96}
    error = {"keep_ratio_allocation": "error"}
    uniform, allocated = (
        make_memory_plan(config_of(**options, **given)).setting for given in ({}, error)
    )
    made = emloc.compress(
        dataset=str(tiny.data),
        output_dir=tmp_path / "emulator",
        format="low_rank",
        **options,
        **error,
    )
    lines = allocated.compress().disk
    assert lines["emulator"] == uniform.compress().disk["emulator"]
    assert Manifest.read(made).summary["emulator_bytes"] <= lines["emulator"]
    assert lines["until layers are cut"] > 0
    assert allocated.train() == uniform.train()


def tiny_optimizer(tiny):
    return sorted((tiny.adapter).glob("checkpoint-*/optimizer.pt"))[-1]


def test_lines_add_up_and_the_slack_is_one_of_them(planned):
    outcome = emloc.plan(model_name_or_path=planned.subject.checkpoint.name, max_length=96)
    assert outcome["parameters"] == planned.subject.parameters
    assert outcome["fits"] is None
    assert list(outcome["stages"]) == ["compress", "train", "correct", "merge", "inference"]
    assert list(outcome["beside"]) == [
        "LoRA on the base", "streamed LoRA on the base", "QLoRA on the base", "polish",
        "inference of the base"]  # fmt: skip
    for row in (*outcome["stages"].values(), *outcome["beside"].values()):
        for place in ("device_bytes", "host_bytes", "disk_bytes"):
            assert row[place]["total"] == sum(row[place]["lines"].values())
            assert all(isinstance(n, int) and n > 0 for n in row[place]["lines"].values())
        slack = row["device_bytes"]["lines"] or row["host_bytes"]["lines"]
        assert slack["allocator slack"] > 0
    assert json.loads(json.dumps(outcome)) == outcome


def test_ways_stand_side_by_side_with_seconds_once_the_device_is_measured(
    planned, tmp_path, monkeypatch
):
    from emloc.planning import rates

    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path))
    monkeypatch.setattr(rates, "FILE_BYTES", 4 << 20)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a"}\n' * 40)
    given = {
        "model_name_or_path": planned.subject.checkpoint.name, "max_length": 96, "memory": "2GiB",
        "device": "cpu", "dataset": str(data), "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }  # fmt: skip
    before = emloc.plan(**given)
    assert [way["name"] for way in before["ways"]] == [
        "LoRA on the base", "streamed LoRA on the base", "QLoRA on the base", "emulator",
        "emulator, then polish"]  # fmt: skip
    assert all(way["seconds_per_step"] is None for way in before["ways"])
    assert before["recommended"]["way"] == "LoRA on the base"
    after = emloc.plan(**given, measure=True)
    seconds = {way["name"]: way["seconds_per_step"] for way in after["ways"]}
    assert all(value > 0 for value in seconds.values())
    assert seconds["streamed LoRA on the base"] > seconds["LoRA on the base"]
    for way in after["ways"]:
        assert way["seconds_per_epoch"] == pytest.approx(10 * way["seconds_per_step"])


def test_a_way_fits_where_its_disk_does_too(planned):
    given = {
        "model_name_or_path": planned.subject.checkpoint.name,
        "memory": "2GiB",
        "max_length": 96,
    }
    assert all(way["fits"] for way in emloc.plan(**given)["ways"])
    short = emloc.plan(**given, disk="1KiB")
    assert not any(way["fits"] for way in short["ways"])
    assert short["recommended"] is None


def test_a_device_that_is_not_here_is_not_measured(bare, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="measure needs the device, but there is no cuda here"):
        emloc.plan(model_name_or_path=bare, device="cuda", measure=True)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_blocks_that_wait_in_memory_are_counted_to_the_byte(planned, bits, tmp_path):
    from emloc.layers.coded_weight import CodedWeight
    from emloc.streaming.streamed_model import StreamedModel

    subject = planned.subject
    plan = emloc.plan(
        model_name_or_path=subject.checkpoint.name, max_length=96, device="cpu", stream=True,
        stream_from="ram", stream_bits=bits,
    )  # fmt: skip
    streamed = StreamedModel(
        subject.family, Checkpoint.open(subject.checkpoint.path), None, "cpu", "ram", "ram", tmp_path,
        bits,
    )  # fmt: skip
    waiting = [each for unit in streamed._weights._in_memory.values() for each in unit]
    tensors = [
        t for each in waiting for t in (each._tensors if isinstance(each, CodedWeight) else [each])
    ]
    lines = plan["stages"]["train"]["device_bytes"]["lines"]
    assert lines["blocks in ram"] == sum(t.numel() * t.element_size() for t in tensors)


def test_on_a_cpu_the_machine_is_the_device(bare):
    outcome = emloc.plan(model_name_or_path=bare, device="cpu")
    assert all(not row["host_bytes"]["lines"] for row in outcome["stages"].values())
    assert outcome["stages"]["merge"]["device_bytes"]["total"] > 0
    gpu = emloc.plan(model_name_or_path=bare, device="cuda")
    assert gpu["stages"]["merge"]["device_bytes"]["total"] == 0
    assert gpu["stages"]["train"]["device_bytes"]["lines"]["CUDA context"] > 0


def test_ways_beside_order_as_they_should(bare):
    """The emulator and QLoRA hold less weight than the base; nothing but the base runs to infer."""
    outcome = emloc.plan(model_name_or_path=bare, dtype="bfloat16")
    weights = {name: row["device_bytes"]["lines"]["weights"]
               for name, row in {**outcome["stages"], **outcome["beside"]}.items()
               if "weights" in row["device_bytes"]["lines"]}  # fmt: skip
    assert weights["train"] < weights["LoRA on the base"]
    assert weights["QLoRA on the base"] < weights["LoRA on the base"]
    assert weights["inference"] == weights["inference of the base"] == outcome["parameters"] * 2
    cache = outcome["beside"]["inference of the base"]["device_bytes"]["lines"]["cache"]
    assert cache == 2 * 5 * 2 * 16 * 1024 * 2  # keys and values · blocks · heads · width · tokens


def test_a_dense_layer_keeps_its_bytes(bare):
    some = config_of(model_name_or_path=bare, exclude=["mlp.down_proj"])
    fewer = make_memory_plan(some).setting
    all_of_them = make_memory_plan(config_of(model_name_or_path=bare)).setting
    assert fewer.train().device["weights"] > all_of_them.train().device["weights"]
    assert all("down_proj" not in name for g in fewer.emulator.groups for name in g.layers)


def test_nothing_is_run_that_grows_with_depth(tmp_path, monkeypatch):
    """Forwards of any module of the model's, real or fake, for 4 blocks and for 12."""
    from transformers.models.llama import modeling_llama

    def count(blocks):
        folder = write_model(tmp_path / str(blocks), hidden_size=64, num_hidden_layers=blocks)
        (folder / "model.safetensors").unlink()
        calls = []
        original = nn.Module.__call__

        def counting(module, *args, **kwargs):
            if type(module).__module__ == modeling_llama.__name__ or isinstance(module, nn.Linear):
                calls.append(type(module).__name__)
            return original(module, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(
                transformers_family, "GROUPS", Remembered(1)
            )  # as if no test had planned before
            patch.setattr(nn.Module, "__call__", counting)
            outcome = emloc.plan(model_name_or_path=str(folder), memory="4GiB")
        return len(calls), outcome

    few, small = count(4)
    many, large = count(12)
    assert few == many > 0  # the two blocks on which layers of one input are found
    per_block = (large["parameters"] - small["parameters"]) // 8
    assert large["parameters"] - small["parameters"] == 8 * per_block


BUDGETS = [3.0, 0.9, 0.5, 0.1]
"""Shares of what the options as they are take."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Large enough that what comes and goes is more than the constants."""
    folder = write_model(tmp_path_factory.mktemp("wide"), hidden_size=512, intermediate_size=2048,
                         num_attention_heads=8, head_dim=64, num_hidden_layers=4)  # fmt: skip
    (folder / "model.safetensors").unlink()
    return Subject.of(str(folder), "auto")


def most(setting):
    return max(fitting.device_bytes(setting, each) for each in planned_stages().values())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_fits_and_what_was_given_up(wide, device):
    options = config_of(model_name_or_path="x", device=device, max_length=2048)
    setting = Setting(wide, options)
    whole = most(setting)
    ratios = []
    for share in BUDGETS:
        outcome = fit(setting, int(share * whole), planned_stages())
        taken = most(outcome.setting)
        if outcome.fits:
            assert taken <= share * whole
            ratios.append(outcome.setting.options.keep_ratio)
            assert 0.1 <= ratios[-1] <= 0.95
            assert (ratios[-1] < 0.25) <= ("an emulator below keep_ratio 0.25" in outcome.given_up)
        else:
            assert outcome.smallest == taken > share * whole
            stage, line = outcome.dominating
            lines = outcome.setting.stage(planned_stages()[stage]).device
            assert lines[line] == max(lines.values())
        order = ["keep_ratio", "gradient_checkpointing", "per_device_train_batch_size", "optim",
                 "calibration_batch_size", "num_calibration_samples", "an", "max_length"]  # fmt: skip
        names = [said.split()[0] for said in outcome.given_up]
        assert names == sorted(names, key=order.index)
        assert ("optim" in names) <= (device == "cuda")
    assert ratios[0] == 0.95
    assert fit(setting, 3 * whole, planned_stages()).given_up == []
    assert not fit(setting, 1 << 20, planned_stages()).fits


def test_the_largest_ratio_that_fits_is_found(wide):
    """A hundredth more would not fit; a ratio that was asked for is kept."""
    options = config_of(model_name_or_path="x", device="cuda", gradient_checkpointing=True,
                        per_device_train_batch_size=1, num_calibration_samples=4,
                        calibration_batch_size=1)  # fmt: skip
    setting = Setting(wide, options)
    budget = most(fitting.with_options(setting, keep_ratio=0.6))
    outcome = fit(setting, budget, planned_stages()).setting
    assert most(outcome) <= budget
    more = fitting.with_options(setting, keep_ratio=outcome.options.keep_ratio + 0.01)
    assert most(more) > budget
    asked = Setting(wide, options.model_copy(update={"keep_ratio": 0.3}))
    assert fit(asked, budget, planned_stages()).setting.options.keep_ratio == 0.3


def test_a_family_that_does_not_say_how_it_trains(wide):
    """Weights are planned, and the absence of activations is said."""
    foreign = SimpleNamespace(
        **{name: getattr(wide.family, name) for name in
           ("name", "skeleton", "blocks", "layer_groups", "kept_dense", "stored")}
    )  # fmt: skip
    subject = object.__new__(Subject)  # whatever may be asked of a family is there, and no more
    subject.__dict__.update(
        checkpoint=wide.checkpoint, family=foreign, model=wide.model, _adapted=None
    )
    setting = Setting(subject, config_of(model_name_or_path="x", device="cuda"))
    assert setting.counted_by.startswith("not counted")
    lines = setting.train().device
    assert "activations" not in lines
    known = Setting(wide, setting.options).train().device
    assert lines["weights"] == known["weights"]
    assert setting.compress().device["block in float32"] > 0


def test_dora_is_traced(bare):
    """What the closed forms do not know is run on fake tensors."""
    outcome = emloc.plan(model_name_or_path=bare, use_dora=True, max_length=40, device="cpu")
    assert outcome["activations"] == "trace"
    plain = emloc.plan(model_name_or_path=bare, max_length=40, device="cpu")
    assert plain["activations"] == "closed form"
    lines = [f["stages"]["train"]["device_bytes"]["lines"]["activations"] for f in (outcome, plain)]
    assert lines[0] > lines[1]


def test_written_to_a_folder_once(bare, tmp_path):
    outcome = emloc.plan(model_name_or_path=bare, memory="2GiB", output_dir=tmp_path / "plan")
    assert json.loads((tmp_path / "plan/plan.json").read_text()) == outcome
    assert (tmp_path / "plan/plan.png").read_bytes().startswith(b"\x89PNG")
    emloc.plan(model_name_or_path=bare, memory="2GiB", output_dir=tmp_path / "plan")
    with pytest.raises(OutputError, match="holds another plan"):
        emloc.plan(model_name_or_path=bare, memory="3GiB", output_dir=tmp_path / "plan")


def test_refusals(bare, tmp_path):
    with pytest.raises(ConfigError, match="expected an amount of memory such as 24GiB"):
        emloc.plan(model_name_or_path=bare, memory="lots")
    with pytest.raises(CheckpointError, match="No folder"):
        emloc.plan(model_name_or_path="/no/where")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no config.json"):
        emloc.plan(model_name_or_path=str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="resolution is an option of the family diffusion"):
        emloc.plan(model_name_or_path=bare, resolution=64)


def test_on_the_command_line(bare):
    def run(*arguments):
        return run_python("-m", "emloc", "plan", bare, *arguments)

    table = run("--memory", "100GB")
    assert table.returncode == 0, table.stderr
    assert "LoRA on the base" in table.stdout
    said = "Fits in 93.13 GiB with format auto, keep_ratio 0.95. Nothing was given up."
    assert said in " ".join(table.stdout.split())
    shown = json.loads(run("--memory", "1MiB", "--json").stdout)
    assert shown["fits"] is False
    assert shown["smallest"] > 1 << 20
    assert total(shown["stages"]["train"]["device_bytes"]["lines"]) > 0


class Anonymous(LiveBytes):
    """Without fake tensors; what lies in a mapped file is ignored by `reading`."""

    def _count(self, tensor, kind):
        return None if isinstance(tensor, FakeTensor) else super()._count(tensor, kind)

    def reading(self, read):
        def mapped(checkpoint, name):
            with _disable_current_modes():
                tensor = read(checkpoint, name)
            self.ignore(tensor)
            return tensor

        return mapped


@pytest.mark.parametrize(("samples", "batch"), [(4, 4), (6, 2)])
def test_compress_holds_what_the_plan_says(tmp_path, monkeypatch, samples, batch):
    """All tensors alive at once, of a base in half precision whose samples differ in length."""
    base = write_model(tmp_path / "base", dtype=torch.bfloat16, hidden_size=192, head_dim=48,
                       intermediate_size=512, num_hidden_layers=3, max_position_embeddings=512)  # fmt: skip
    data = tmp_path / "train.jsonl"
    lines = [json.dumps({"text": "a" * (255 - index)}) for index in range(samples)]
    data.write_text("\n".join(lines) + "\n")
    options = {"model_name_or_path": str(base), "dataset": str(data), "max_length": 256,
               "format": "low_rank",
               "num_calibration_samples": samples, "calibration_batch_size": batch}  # fmt: skip
    live = Anonymous()
    monkeypatch.setattr(Checkpoint, "read", live.reading(Checkpoint.read))
    with live:
        emloc.compress(output_dir=tmp_path / "emulator", device="cpu", **options)
    outcome = emloc.plan(device="cpu", **options)["stages"]["compress"]["device_bytes"]["lines"]
    planned = sum(count for name, count in outcome.items() if name != "allocator slack")
    assert planned == pytest.approx(live.peak.total, rel=0.03)
