"""Put a LoRA on a stock pipeline, and be sure that all of it is used.

diffusers takes from a file what belongs to a pipeline's components, by the first word of each key, and of
that what finds its layer; a layer that finds no tensor keeps random ones. Either brings a warning at most.
So the tensors on the pipeline must be those of the file, each once; compared by their values, since names
are converted on the way.
"""

import hashlib
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging as transformers_logging

from emloc.artefacts.adapter_config import CONFIG_NAME
from emloc.errors import CheckpointError, MismatchError
from emloc_diffusion.export import DIFFUSERS_NAME, export_adapter


def put_on(pipeline: Any, adapter: Path) -> None:
    """`pipeline.load_lora_weights(adapter)`.

    Args:
        adapter: a folder with diffusers' file, or with PEFT's alone.

    Raises:
        CheckpointError: it has neither.
        MismatchError: the pipeline cannot load it, or does not use all of it.
    """
    kind = type(pipeline).__name__
    with _diffusers_folder(adapter, pipeline) as folder, _quiet():
        try:
            pipeline.load_lora_weights(str(folder), local_files_only=True)
        except (
            OSError, ValueError, LookupError, RuntimeError, AttributeError, SafetensorError
        ) as problem:  # fmt: skip
            if isinstance(problem, torch.OutOfMemoryError):
                raise
            reason = textwrap.shorten(str(problem) or type(problem).__name__, 200)
            raise MismatchError(
                f"{adapter}: a {kind} cannot load it ({reason}); it is for another pipeline, or its "
                f"{DIFFUSERS_NAME} is damaged."
            ) from problem
        state = pipeline.lora_state_dict(str(folder), local_files_only=True)
    tensors: dict[str, Tensor] = state[0] if isinstance(state, tuple) else state
    unused, made_up = _compare(pipeline, tensors)
    if unused:
        raise MismatchError(
            f"{adapter}: a {kind} uses {len(tensors) - len(unused)} of its {len(tensors)} tensors but not "
            f"{unused[0]}; it is for another pipeline."
        )
    if made_up:
        raise MismatchError(
            f"{adapter}: {made_up} tensors of the layers that it adapts are not in its "
            f"{DIFFUSERS_NAME}; the file is incomplete."
        )


def _compare(pipeline: Any, tensors: dict[str, Tensor]) -> tuple[list[str], int]:
    """The file's tensors that are not on the pipeline, and how many there are not in the file."""
    parts = {
        part: getattr(pipeline, part, None) for part in {key.partition(".")[0] for key in tensors}
    }
    loaded = {part: Counter(map(_identity, _active_lora(one))) for part, one in parts.items()}
    dtypes = {part: one.dtype for part, one in parts.items() if one is not None}
    unused: list[str] = []
    for key, tensor in tensors.items():
        part = key.partition(".")[0]
        own = _identity(tensor.to(dtypes.get(part, tensor.dtype)))
        if loaded[part][own]:
            loaded[part][own] -= 1
        else:
            unused.append(key)
    return unused, sum(count.total() for count in loaded.values())


def _active_lora(component: Any) -> Iterator[Tensor]:
    for module in [] if component is None else component.modules():
        if isinstance(module, LoraLayer):
            for name in module.active_adapters:
                for part in (module.lora_A, module.lora_B, module.lora_magnitude_vector):
                    if name in part:
                        yield from part[name].parameters()


def _identity(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{tensor.numel()}|{hashlib.sha256(flat.numpy().tobytes()).hexdigest()}"


@contextmanager
def _diffusers_folder(adapter: Path, pipeline: Any) -> Iterator[Path]:
    """The folder itself, or, where it has PEFT's files alone, one with the same in diffusers' format."""
    if (adapter / DIFFUSERS_NAME).is_file():
        yield adapter
    elif (adapter / CONFIG_NAME).is_file():
        component = "unet" if hasattr(pipeline, "unet") else "transformer"
        with tempfile.TemporaryDirectory() as temporary:
            export_adapter(adapter, component, ["diffusers"], Path(temporary))
            yield Path(temporary)
    else:
        raise CheckpointError(
            f"{adapter} has no {DIFFUSERS_NAME} and is not a PEFT adapter; pass the folder of a LoRA."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings of what a file lacks: most lack text encoders, and are right to."""
    before = [library.get_verbosity() for library in (diffusers_logging, transformers_logging)]
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity(library.CRITICAL)
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before[0])
        transformers_logging.set_verbosity(before[1])
