"""Laws of the artefacts that the stages make of a family's model, and of what is said about them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import emloc
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.extend.capabilities import adapter_formats_of
from emloc.options.compress import LOW_RANK_FORMAT
from emloc.planning.family import PlannedFamily
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject

KINDS = {
    "emulator": "emulator",
    "adapter": "adapter",
    "corrected": "corrected_adapter",
    "merged": "merged_model",
}


EXACT = 1e-4
"""The Frobenius norm below which a mismatch is rounding, of a layer that its form holds exactly."""


class StageLaws(SubjectFixture):
    """Promises of the stages, held to for a family."""

    def test_stages_leave_what_they_promise(self, subject: Subject) -> None:
        """Artefacts of their kinds, which name their origin and pass `verify`."""
        digest = Checkpoint.open(subject.example["model_name_or_path"]).digest()
        for name, folder in subject.stages.items():
            manifest = Manifest.read(folder)
            assert manifest.kind == KINDS[name]
            assert manifest.base_model.digest == digest, name
            assert manifest.family == subject.family.name
            if name != "adapter":
                assert emloc.verify(path=folder)["kind"] == KINDS[name]
        emulator = Manifest.read(subject.stages["emulator"])
        assert emulator.summary["emulator_bytes"] < emulator.summary["base_bytes"]
        assert all(0 <= entry["relative_error"] < 1 for entry in emulator.layers.values())
        assert Manifest.read(subject.stages["adapter"]).summary["train_weight_bytes"] > 0

    def test_adapters_are_written_in_the_familys_formats(self, subject: Subject) -> None:
        """PEFT's two files, which stock PEFT reads, and those of every other format beside them."""
        own = {"adapter_config.json", "adapter_model.safetensors"}
        others: set[str] = set()
        for name in (
            "corrected",
            "adapter",
        ):  # training leaves its log and more beside what it trained
            folder = subject.stages[name]
            files = Manifest.read(folder).files.keys()
            assert own | others <= files
            assert all((folder / file).is_file() for file in files)
            if name == "corrected":
                others, more = set(files - own), len(adapter_formats_of(subject.family)) - 1
                assert (len(others) >= more) if more else not others

    def test_each_stage_was_planned_and_kept_to_its_memory(self, subject: Subject) -> None:
        """Each says what was planned and what was measured, and the limit is no setting."""
        for folder in subject.stages.values():
            manifest = Manifest.read(folder)
            assert 0 < manifest.measured["planned_bytes"] <= 1 << 30
            assert manifest.measured["peak_bytes"] <= 1 << 30
            assert "memory" not in manifest.settings

    def test_a_plan_of_the_config_alone_counts_what_the_stages_wrote(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        """Without weights: parameters and the emulator's bytes, and those of training where it can.

        To the byte in low rank; where forms are chosen by data, a guess stands for them.
        """
        model = subject.example["model_name_or_path"]
        ignore = shutil.ignore_patterns("*.safetensors")
        bare = shutil.copytree(model, tmp_path / "bare", ignore=ignore)
        unread = {**subject.example, "model_name_or_path": str(bare)}
        options = {"lora_r": 3, **subject.options("plan")}
        low_rank = {"format": LOW_RANK_FORMAT, "keep_ratio": 0.5}
        plan = emloc.plan(**unread, **low_rank, **options)
        whole = subject.family.load(subject.checkpoint, "float32", "cpu")
        assert plan["parameters"] == sum(parameter.numel() for parameter in whole.parameters())
        compress = plan["stages"]["compress"]["disk_bytes"]["lines"]
        emulator = subject.compress(tmp_path / "low_rank", **low_rank)
        written = _bytes(emulator)
        assert compress["emulator"] == written
        lines = plan["stages"]["train"]["device_bytes"]["lines"]
        if not isinstance(subject.family, PlannedFamily):
            assert plan["activations"].startswith("not counted")
            assert "activations" not in lines
            return
        trained = Manifest.read(subject.stages["adapter"]).summary
        assert lines["LoRA"] + lines.get("modules to save", 0) == trained["trainable_bytes"]
        assert lines["weights"] == written
        held = trained["train_weight_bytes"] - trained["trainable_bytes"]
        assert held == _bytes(subject.stages["emulator"])
        guessed = emloc.plan(**unread, **subject.compressed_to, **options)["stages"]["train"]
        assert guessed["device_bytes"]["lines"]["weights"] == pytest.approx(held, rel=0.05)

    def test_correction_removes_the_residual(self, subject: Subject) -> None:
        """Without a limit, of every layer that the emulator changed; A stays as it was trained.

        B moves where there is something to correct, and stays of layers that the emulator holds as they are.
        """
        reports = Manifest.read(subject.stages["corrected"]).layers
        for name, entry in reports.items():
            left = entry["residual_after"]
            assert left <= max(1e-3 * entry["residual_before"], EXACT), name
        before, after = (Adapter.open(str(subject.stages[k])) for k in ("adapter", "corrected"))
        for layer in before.layers:
            assert torch.equal(before.read(layer.down_key), after.read(layer.down_key))
            same = torch.equal(before.read(layer.up_key), after.read(layer.up_key))
            if layer.name not in reports:
                assert same, layer.name
            elif reports[layer.name]["residual_before"] > EXACT:
                assert not same, layer.name

    def test_merged_weights_are_the_sum(self, subject: Subject) -> None:
        """`W + s·B·A` in float64 of every adapted layer; what was trained whole is the adapter's.

        Every other tensor is the base's.
        """
        family, base = subject.family, subject.checkpoint
        merged = Checkpoint.open(str(subject.stages["merged"]))
        adapter = Adapter.open(str(subject.stages["corrected"]))
        model = family.skeleton(base, torch.float32)
        changed: set[str] = set()
        for layer in adapter.layers:
            stored = family.stored(model, f"{layer.name}.weight", base)
            assert stored is not None, layer.name
            changed |= set(stored.names)
            b, a = (adapter.matrix(key).double() for key in (layer.up_key, layer.down_key))
            wanted = stored.layer_weight(base.read).double() + layer.scaling * b @ a
            torch.testing.assert_close(
                stored.layer_weight(merged.read).double(), wanted, rtol=1e-5, atol=1e-5
            )
        assert changed
        for parameter, key in adapter.saved.items():
            stored = family.stored(model, parameter, base)
            assert stored is not None, parameter
            changed |= set(stored.names)
            if stored.plain_name is not None:
                torch.testing.assert_close(merged.read(stored.plain_name), adapter.read(key))
        assert merged.tensors.keys() == base.tensors.keys()
        for name in base.tensors.keys() - changed:
            assert torch.equal(merged.read(name), base.read(name)), name

    def test_merged_scores_as_the_adapter_does(self, subject: Subject) -> None:
        """The loss on the data, by stock PEFT or as the family scores itself."""
        plain = subject.evaluate()["loss"]
        adapted = subject.evaluate(adapter=str(subject.corrected))["loss"]
        merged = subject.evaluate(model_name_or_path=str(subject.merged))["loss"]
        assert merged == pytest.approx(adapted, rel=1e-4)
        assert abs(plain - adapted) > 1e-4

    def test_manifests_are_json_without_surprises(self, subject: Subject) -> None:
        """Manifests hold no NaN, which JSON does not know."""
        for folder in subject.stages.values():
            text = (folder / "emloc.json").read_text("utf-8")
            assert json.loads(text)["format"] == 2
            assert "NaN" not in text


def _bytes(folder: Path) -> int:
    return sum(info.nbytes for info in Checkpoint.open(str(folder)).tensors.values())
