"""A small pipeline with pictures, and tiny encoders."""

from types import SimpleNamespace

import pytest
import torchvision_schemas  # noqa: F401  (before what may import torchvision)
from tiny_encoders import write_clip, write_dino

from emloc_diffusion.example import write_pictures
from emloc_diffusion.example_pipelines import write_pipeline


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    base = write_pipeline(root / "base", "sd", seed=3)
    pictures = write_pictures(root / "pictures", 3, seed=4)
    return SimpleNamespace(root=root, base=base, pictures=pictures)


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory):
    return write_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))
