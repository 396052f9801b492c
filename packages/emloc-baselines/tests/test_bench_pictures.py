"""The bench on data sets whose rows name pictures beside them."""

from functools import partial

import emloc_vlm.example
from emloc_baselines.bench.cells import method_cell, prepare_data
from emloc_baselines.bench.config import read_config
from emloc_vlm.rows import load_examples
from emloc_vlm_options import ImageOptions


def test_rows_that_are_split_off_still_find_their_pictures(tmp_path):
    example = emloc_vlm.example.write_example(tmp_path / "vlm", 0)
    given = {
        "model_name_or_path": example["model_name_or_path"], "output_dir": str(tmp_path / "bench"),
        "validation_samples": 2, "train": {"learning_rate": [1e-3, 1e-2]}, "methods": ["lora"],
        "datasets": {"shapes": {"dataset": example["dataset"]}},
    }  # fmt: skip
    config = read_config(given)
    data = prepare_data(config, "shapes")
    folder = str(tmp_path / "vlm")
    assert data.training["image_folder"] == data.validation["image_folder"] == folder
    own = prepare_data(read_config({**given, "image_folder": "elsewhere"}), "shapes")
    assert "image_folder" not in own.training
    assert own.validation["image_folder"] == "elsewhere"
    for part in (data.training, data.validation):
        options = ImageOptions(image_folder=part["image_folder"])
        options.__dict__.update(dataset_split="train", column_map={}, streaming=False)
        for row in load_examples(options, part["dataset"]):
            assert [image.open().size for image in row.images]


def test_where_pictures_lie_is_no_part_of_a_cell(tmp_path):
    """The folder may hold the bench itself, which grows; the pictures that rows name have digests."""
    example = emloc_vlm.example.write_example(tmp_path / "vlm", 0)
    config = read_config(
        {
            "model_name_or_path": example["model_name_or_path"],
            "output_dir": str(tmp_path / "vlm/bench"), "validation_samples": 2, "methods": ["lora"],
            "train": {"learning_rate": [1e-3, 1e-2]},
            "datasets": {"shapes": {"dataset": example["dataset"]}},
        }
    )  # fmt: skip
    data = prepare_data(config, "shapes")
    cell = partial(method_cell, config, data, "shapes", "lora", 0.4, 0, 1e-3)
    assert "image_folder" in cell().task.train
    assert "image_folder" not in cell().inputs["train"]
    assert cell().inputs["train"]["files"]
