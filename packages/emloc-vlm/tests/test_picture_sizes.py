"""Sizes of pictures that published processors ask for pass, and others do not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.image_utils import SizeDict

from emloc.errors import CheckpointError
from emloc_vlm.picture_sizes import require_few_places, require_modest

PUBLISHED = [
    {"size": {"height": 448, "width": 448}, "max_patches": 12, "crop_size": None},  # InternVL
    {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},  # Qwen2-VL: pixels
    {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}},  # Idefics3
    {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},  # LLaVA
    {"size": {"longest_edge": 1540}, "patch_size": {"height": 14, "width": 14}},  # Pixtral
    {"size": {"height": 560, "width": 560}, "max_image_tiles": 4},  # Mllama
    {"size": 224},
    {"size": [384, 384]},
    {"size": None},
    {},
    {"size": SizeDict(height=448, width=448)},
    {"rescale_factor": 1 / 255, "image_mean": [0.5, 0.5, 0.5], "image_std": (0.2, 0.3, 0.2)},
    {"rescale_factor": None, "image_mean": 0.5},
]


@pytest.mark.parametrize("sizes", PUBLISHED)
def test_published_sizes_pass(sizes):
    require_modest(SimpleNamespace(**sizes), Path("m"))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"size": {"height": 16_000_000, "width": 16}}, "into 256,000,000 pixels"),
        (
            {"size": {"height": 448, "width": 448}, "max_patches": 10**6},
            "into 200,704,000,000 pixels",
        ),
        ({"size": SizeDict(height=16, width=16_000_000)}, "into 256,000,000 pixels"),
        ({"size": {"shortest_edge": 10**9}}, "into 1,000,000,000 pixels"),
        ({"size": {"height": "x", "width": 1}}, "size = .* which are not numbers of pixels"),
        ({"size": {"height": True, "width": 1}}, "which are not numbers"),
        ({"size": 224, "max_patches": -1}, "max_patches = -1, which are not numbers"),
        ({"rescale_factor": [0] * 1000}, "rescale_factor = .* neither a number nor one for each"),
        ({"image_mean": "0.5"}, "image_mean = 0.5, which is neither"),
        ({"image_std": [0.5, None]}, "image_std"),
    ],
)
def test_sizes_of_no_model_are_refused(sizes, says):
    with pytest.raises(CheckpointError, match=says):
        require_modest(SimpleNamespace(**sizes), Path("m"))


@pytest.mark.parametrize("places", [-1, 10**6, 1.5, True, "256"])
def test_a_picture_of_a_million_tokens_is_refused(places):
    require_few_places(SimpleNamespace(image_seq_length=256), Path("m"))
    require_few_places(SimpleNamespace(), Path("m"))
    with pytest.raises(CheckpointError, match="image_seq_length"):
        require_few_places(SimpleNamespace(image_seq_length=places), Path("m"))


@pytest.mark.parametrize("reads_videos", [True, False])
def test_a_folder_without_a_video_processor_is_read_where_torchvision_is(
    monkeypatch, tmp_path, reads_videos
):
    """transformers asks for one there, of folders that were saved where it was not, too."""
    from emloc_vlm import processor
    from emloc_vlm.family import VLMFamily

    example = VLMFamily().write_example(tmp_path / "example", seed=0)
    folder = Path(example["model_name_or_path"])

    def without(path, **_):
        raise OSError(f"Can't load video processor for '{path}'.")

    monkeypatch.setattr(processor, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(processor.AutoProcessor, "from_pretrained", without)
    if not reads_videos:
        kind = SimpleNamespace(get_attributes=lambda: ["image_processor", "tokenizer"])
        monkeypatch.setattr(processor, "_class_of", lambda *_: kind)
        with pytest.raises(CheckpointError, match="has no processor that transformers can build"):
            processor.load_processor(folder)
        return
    assert processor.load_processor(folder).image_processor is not None
