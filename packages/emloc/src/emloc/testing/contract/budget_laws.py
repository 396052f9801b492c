"""Laws of budgets: bytes and memory that are promised before are kept to."""

from pathlib import Path

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.options.compress import LOW_RANK_FORMAT
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject

RATIOS = (0.45, 0.7)


class BudgetLaws(SubjectFixture):
    """Promises of compress and plan about sizes, over the family's own layers."""

    def test_an_emulator_has_the_bits_that_were_asked_for(self, subject: Subject) -> None:
        """All that stands for the weights that compress looks at is within the budget."""
        asked = subject.compressed_to.get("bits_per_weight")
        if asked is None:
            return
        base = subject.checkpoint
        weights = [
            subject.family.stored(subject.skeleton, f"{name}.weight", base)
            for group in subject.family.layer_groups(subject.skeleton)
            for name in group
        ]
        dense = [stored.read(base.read) for stored in weights if stored is not None]
        assert len(dense) == len(weights)
        summary = Manifest.read(subject.emulator).summary
        rest = summary["base_bytes"] - sum(weight.nbytes for weight in dense)
        held = summary["emulator_bytes"] - rest
        assert 0 < 8 * held <= asked * sum(weight.numel() for weight in dense)

    def test_an_allocation_by_error_keeps_to_its_bytes(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        """The layers take no more than their share of bytes, and a larger share has no larger error."""
        given = {"format": LOW_RANK_FORMAT, "keep_ratio_allocation": "error"}
        errors: list[float] = []
        for ratio in RATIOS:
            folder = subject.compress(tmp_path / str(ratio), keep_ratio=ratio, **given)
            manifest, dense = Manifest.read(folder), 0
            held = Checkpoint.open(str(folder)).tensors
            for name in (name for entry in manifest.layers.values() for name in entry["layers"]):
                stored = subject.family.stored(
                    subject.skeleton, f"{name}.weight", subject.checkpoint
                )
                assert stored is not None
                dense += stored.read(subject.checkpoint.read).nbytes
            rest = manifest.summary["base_bytes"] - dense
            assert sum(info.nbytes for info in held.values()) == manifest.summary["emulator_bytes"]
            assert manifest.summary["emulator_bytes"] - rest <= ratio * dense
            predicted = manifest.summary["predicted_error"]
            assert predicted["allocated"] <= predicted["uniform"] * (1 + 1e-6)
            errors.append(predicted["allocated"])
        assert errors[1] <= errors[0]

    def test_stages_keep_to_the_memory_that_the_plan_states(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        """Given no more than the plan says that they need, compress and train come to their end."""
        low_rank = {"format": LOW_RANK_FORMAT, "keep_ratio": 0.5}
        options = {"lora_r": 3, **subject.options("plan")}
        stages = emloc.plan(**subject.example, **low_rank, **options)["stages"]
        needed = {name: stages[name]["device_bytes"]["total"] for name in ("compress", "train")}
        folder = subject.compress(tmp_path / "small", memory=needed["compress"], **low_rank)
        subject.train(tmp_path / "adapter", emulator=str(folder), memory=needed["train"])
