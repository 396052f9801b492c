"""Stages on a pretended CUDA device: they never mix devices, and give what they give on the CPU."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

import emloc
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.config import CompressConfig, EvaluateConfig
from emloc.extend.plugin_options import with_family_options, with_plugin_options
from emloc.extend.plugins import load_plugins
from emloc.options.marks import loss_alone
from emloc.streaming.block_gradients import backward_by_block
from emloc.streaming.stream import UnitStream
from emloc.testing import pretend_device

with_own = pytest.mark.parametrize(
    "subject", [*sorted(load_plugins().families), "classifier"], indirect=True, scope="session"
)
"""For what nothing but a family of one's own uses: the trainer that `TransformersFamily` gives it."""


@pytest.fixture
def card():
    with pretend_device() as traffic:
        yield traffic


@pytest.fixture
def data(example):
    return {key: value for key, value in example.items() if key != "model_name_or_path"}


def same_weights(one, other):
    files = [path.relative_to(one) for path in Path(one).rglob("*.safetensors")]
    assert files
    for file in files:
        assert (Path(one) / file).read_bytes() == (Path(other) / file).read_bytes(), file


CARD = {"allocator slack", "CUDA context"}
"""Lines of a plan that nothing here can take."""


LOW_RANK = {"format": "low_rank", "keep_ratio": 0.5}
"""Rounding is thousands of small steps, each of which a pretended device takes long for."""


def test_compress_and_correct_and_merge(example, data, stages, card, tmp_path):
    here = emloc.compress(output_dir=tmp_path / "here", device="cpu", **LOW_RANK, **example)
    emulator = emloc.compress(output_dir=tmp_path / "there", device="cuda", **LOW_RANK, **example)
    same_weights(here, emulator)
    corrected = emloc.correct(
        adapter=str(stages["adapter"]), emulator=str(stages["emulator"]),
        output_dir=tmp_path / "corrected", limit="none", device="cuda", **data,
    )  # fmt: skip
    same_weights(stages["corrected"], corrected)
    merged = emloc.merge(adapter=str(corrected), output_dir=tmp_path / "merged")
    same_weights(stages["merged"], merged)
    assert card.live_bytes == 0
    assert card.unfinished == 0
    plan = emloc.plan(device="cuda", **LOW_RANK, **example)["stages"]["compress"]
    planned = sum(n for line, n in plan["device_bytes"]["lines"].items() if line not in CARD)
    measured = Manifest.read(emulator).measured["peak_bytes"]
    assert planned / 5 < measured <= planned  # the plan is of the longest samples allowed
    assert plan["host_bytes"]["lines"]["suspended calls"] > 0


def test_a_limit_is_chosen(stages, data, tmp_path):
    def choose(folder, device):
        return emloc.correct(
            adapter=str(stages["adapter"]), emulator=str(stages["emulator"]),
            output_dir=folder, limit="auto", num_calibration_samples=8, device=device, **data,
        )  # fmt: skip

    with pretend_device():
        there = choose(tmp_path / "there", "cuda")
    same_weights(choose(tmp_path / "here", "cpu"), there)


def test_a_loss_is_measured(family, stages, data, card):
    kind = with_family_options(EvaluateConfig, family)
    few = loss_alone(kind)
    if "num_noise_samples" in kind.model_fields:
        few["num_noise_samples"] = 2
    emulator = {"model_name_or_path": str(stages["emulator"])}
    there = emloc.evaluate(device="cuda", **emulator, **data, **few)["loss"]
    assert there == emloc.evaluate(device="cpu", **emulator, **data, **few)["loss"]


@with_own
def test_an_adapter_is_trained(stages, data, card, tmp_path):
    """With the family's own trainer, in bfloat16 as on a card: to numbers, on the device."""
    adapter = emloc.train(
        emulator=str(stages["emulator"]), output_dir=tmp_path / "adapter", max_steps=1,
        device="cuda", **data,
    )  # fmt: skip
    assert (adapter / "emloc.json").is_file()
    assert card.peak_bytes > 0


@with_own
def test_blocks_come_and_go_while_a_lora_is_trained(family, example, card, tmp_path):
    """In bfloat16, as the Trainer has it on a card: the same losses, and autocast is off afterwards."""
    options = {
        **example, "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "lora_r": 2, "device": "cuda",
    }  # fmt: skip

    def losses(folder, **more):
        made = emloc.train(output_dir=tmp_path / folder, **options, **more)
        assert not torch.is_autocast_enabled("cuda")
        lines = (made / "trainer_log.jsonl").read_text().splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]

    streamed = losses("streamed", stream=True, stream_from="ram")
    assert len(streamed) == 2
    in_memory = losses("in-memory")
    if family.name != "classifier":  # whose dropout is drawn in another order
        assert streamed == pytest.approx(in_memory, rel=2e-3)
    assert card.unpinned == card.unfinished == 0


def on_both(run):
    """The results of `run(device)` on the CPU and on the pretended device."""
    with pretend_device():
        there = run("cuda")
    return run("cpu"), there


def close(some, others):
    """Equal by name but for the order of sums: autograd multiplies in another one by device."""
    assert some.keys() == others.keys() != set()
    largest = max(float(tensor.abs().max()) for tensor in some.values())
    for name, tensor in some.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=1e-5 * largest, msg=name)


def few_batches(family, example):
    checkpoint = Checkpoint.open(example["model_name_or_path"])
    options = with_plugin_options(CompressConfig)(
        output_dir="unused", num_calibration_samples=6, calibration_batch_size=2, **example
    )
    return checkpoint, family.calibration_batches(checkpoint, options)


def test_gradients_are_found_block_by_block(family, example):
    checkpoint, batches = few_batches(family, example)

    def gradients(device):
        stream, gradient_of = UnitStream(family, checkpoint, device), {}

        @contextmanager
        def visit(block, module):
            module.requires_grad_(True)
            yield
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    assert parameter.grad.device.type == device
                    gradient_of[f"{block}.{name}"] = parameter.grad.cpu()

        return backward_by_block(stream, batches, visit), gradient_of

    (loss, here), (same, there) = on_both(gradients)
    assert loss == pytest.approx(same, rel=1e-6)
    close(here, there)


def test_one_bare_step(family, example, stages):
    """Forward, loss, backward and optimiser of a LoRA on every low-rank layer, without a trainer."""
    _, batches = few_batches(family, example)
    emulator = Checkpoint.open(str(stages["emulator"]))
    layers = list(Adapter.open(str(stages["adapter"])).layers)

    def step(device):
        model = family.load(emulator, "float32", device)
        names = [name for name, _ in model.named_modules()]
        targets = [n for n in names if any(layer.name.endswith(n) for layer in layers if n)]
        torch.manual_seed(0)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), model)
        trained = {n: p for n, p in model.named_parameters() if "lora_" in n}
        assert {p.device.type for p in model.parameters()} == {device}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
        for batch in batches[:2]:
            total, terms = family.loss(model, {k: v.to(device) for k, v in batch.items()})
            (total / terms).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: parameter.detach().cpu() for name, parameter in trained.items()}

    here, there = on_both(step)
    close(here, there)
    assert all(weight.abs().sum() > 0 for weight in there.values())
