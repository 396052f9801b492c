"""The device on which a stage computes: `auto` and every name are resolved here, once, before any work.

Stages run on `cpu` and on `cuda`. Apple's `mps` has no float64, in which moments and eigenproblems are
held, so `auto` passes it over.
"""

import difflib
import re
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator

AUTO = "auto"
_NAMES = ["auto", "cpu", "cuda"]
_PATTERN = re.compile(r"(cpu|cuda)(?::(\d{1,4}))?")


def device_here(name: str) -> str:
    """A device of this machine: the first CUDA device for `auto` where there is one, else the CPU.

    Raises:
        ValueError: it is no device's name, or torch finds no such device here.
    """
    name = planned_device(name)
    if not name.startswith("cuda"):
        return name
    if not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here; leave device out, or pass cpu")
    number, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
    if number >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ValueError(f"there is no such device here; torch finds {there}")
    return name


def planned_device(name: str) -> str:
    """The same, except that a CUDA device need not be here: nothing is run on it.

    Raises:
        ValueError: it is no device's name.
    """
    if name == AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    match = _PATTERN.fullmatch(name)
    if match is None:
        raise ValueError(f"expected auto, cpu, cuda or cuda:1{_hint(name)}")
    return "cpu" if match[1] == "cpu" else name


def _hint(name: str) -> str:
    if name.startswith(("mps", "xpu", "npu", "hpu", "xla")):
        return f"; stages do not run on {name.partition(':')[0]}"
    close = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.5)
    return f". Did you mean {close[0]}?" if close else ""


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, torch.device) else value


Device = Annotated[str, BeforeValidator(_text), AfterValidator(device_here)]
PlannedDevice = Annotated[str, BeforeValidator(_text), AfterValidator(planned_device)]
