"""Lets torchvision be imported beside a torch that its C++ operators were not built for.

timm imports torchvision, which registers shape rules for two operators as it is imported. Where the
operators did not load, there is nothing to register for, and the import fails although nothing here calls
them: declaring the two is enough. Import this before anything that may import torchvision.
"""

import importlib.util
from pathlib import Path

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def declare_missing() -> None:
    """Declare `nms` and `qnms` if torchvision is there and its own are not."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    for library in Path(spec.submodule_search_locations[0]).glob("_C*"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", SCHEMA)


declare_missing()
