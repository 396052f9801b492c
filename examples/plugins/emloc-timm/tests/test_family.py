"""The contract of every family on a tiny ViT, and what the family promises beside it."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from peft import PeftModel
from PIL import Image

from emloc.plugin import Checkpoint, CheckpointError, ConfigError, DataError, DataOptions
from emloc.testing import FamilyContract
from emloc_timm.data import Pictures, in_order, rows


def test_classes_come_in_the_order_of_their_numbers(tmp_path):
    """A label that is a number is the class of that number, as in timm."""
    labels = [*range(12), *map(str, range(12))]
    data = tmp_path / "labels.jsonl"
    for part in (labels[:12], labels[12:]):
        lines = (json.dumps({"image": "a.png", "label": label}) for label in reversed(part))
        data.write_text("\n".join(lines))
        named = sorted({label for _, label in rows(data)}, key=in_order)
        assert named == [str(number) for number in range(12)]
    assert sorted(["b10", "b9", "a", "10", "9"], key=in_order) == ["9", "10", "a", "b9", "b10"]
    for label in (None, True, 1.5, {"a": 1}):
        data.write_text(json.dumps({"image": "a.png", "label": label}))
        with pytest.raises(DataError, match="neither a folder of class folders nor a JSONL"):
            rows(data)


class TestTimm(FamilyContract):
    family = "timm"
    plugin = "emloc_timm_hooks"

    def test_timm_itself_loads_what_was_merged(self, subject):
        """With the scores of timm's own base under the LoRA in stock PEFT."""
        base, merged = (
            timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            for folder in (subject.example["model_name_or_path"], subject.merged)
        )
        adapted = PeftModel.from_pretrained(base, str(subject.corrected)).eval()
        pixels = subject.batches[0]["pixels"]
        with torch.no_grad():
            torch.testing.assert_close(merged(pixels), adapted(pixels), rtol=1e-4, atol=1e-4)

    def test_the_head_may_be_trained_whole(self, subject, tmp_path):
        more = {"lora_modules_to_save": ["head"]}
        adapter = subject.train(tmp_path / "adapter", **more)
        corrected = subject.correct(tmp_path / "corrected", adapter=str(adapter))
        model = PeftModel.from_pretrained(
            subject.family.load(subject.checkpoint, "float32", "cpu"), str(corrected)
        )
        head = model.get_submodule("base_model.model.head.modules_to_save.default")
        assert not torch.equal(head.weight, subject.checkpoint.read("head.weight"))

    def test_a_jsonl_file_has_the_samples_of_its_folder(self, subject, tmp_path):
        folder = Path(subject.example["dataset"])
        rows = [{"image": str(p), "label": p.parent.name} for p in sorted(folder.glob("*/*"))]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        one, other = (
            Pictures(subject.checkpoint, DataOptions(dataset=str(name))).batch(range(24))
            for name in (folder, tmp_path / "rows.jsonl")
        )
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert one["labels"].tolist() == sorted([0, 1, 2, 3] * 6)

    def test_data_that_do_not_fit_are_one_sentence(self, subject, tmp_path):
        folder = Path(shutil.copytree(subject.example["dataset"], tmp_path / "pictures"))
        (folder / "red" / "0.png").write_text("no picture")
        with pytest.raises(DataError, match=r"0\.png is no picture that can be read"):
            subject.evaluate(dataset=str(folder))
        (folder / "white").mkdir()
        Image.new("RGB", (9, 9)).save(folder / "white" / "0.png")
        with pytest.raises(DataError, match="has 5 classes, and .* tells 4 apart"):
            subject.evaluate(dataset=str(folder))
        (tmp_path / "rows.jsonl").write_text('{"picture": "a.png"}\n')
        with pytest.raises(DataError, match="neither a folder of class folders nor a JSONL file"):
            subject.evaluate(dataset=str(tmp_path / "rows.jsonl"))

    def test_other_models_and_options_are_refused(self, subject, tmp_path):
        with pytest.raises(ConfigError, match="the family timm does not read optim"):
            subject.train(tmp_path / "adapter", optim="sgd")
        model = Path(shutil.copytree(subject.example["model_name_or_path"], tmp_path / "model"))
        config = json.loads((model / "config.json").read_text())
        for change in ({"depth": 2}, {"embed_dim": 48}, {"embed_dim": 31}, {"pretrained": True}):
            args = {**config["model_args"], **change}
            (model / "config.json").write_text(json.dumps({**config, "model_args": args}))
            with pytest.raises(CheckpointError, match=r"not those of its config|cannot build"):
                subject.family.load(Checkpoint.open(str(model)), "auto", "cpu")
