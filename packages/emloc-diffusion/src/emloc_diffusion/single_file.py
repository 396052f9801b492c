"""Original checkpoints: one file with denoiser, VAE and text encoders under the names of Stability AI's and
Black Forest Labs' own programs, read by diffusers' `from_single_file` and saved as a pipeline folder.

The file has no configuration, no tokenizers and no scheduler: those of a pipeline of its kind serve, whose
folder may also lend what the file lacks (FLUX files are often the transformer alone).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import CheckpointError
from emloc_diffusion.encode.components import (
    check_libraries,
    load_errors,
    read_model_index,
    whole_part,
)
from emloc_diffusion.encode.text import ENCODINGS

CONFIG_FILES = ["*.json", "*.txt", "*.model"]
OTHER_PARTS: Mapping[str, tuple[str, ...]] = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.", "text_encoders."),
}
"""Prefixes of what is no denoiser."""

T5 = "text_encoders.t5xxl."
OF_ITS_KIND = (
    "check that the file is complete, and pass a configuration of its kind as single_file_config"
)

WIDEST = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHARD_SIZE = "2GB"
"""Files are put together in memory, so they are kept small."""


class OriginalLayout:
    """`emloc.extend.single_file.SingleFileReader` of diffusion models."""

    def configuration(self, file: Checkpoint, named: str | None) -> Path:
        """See `SingleFileReader`; without a name, the pipeline that diffusers takes the file for."""
        source = _guess(file) if named is None else named
        folder = Path(source)
        if not folder.is_dir():
            folder = _download(file, source, guess=named is None)
        kind = read_model_index(folder).get("_class_name")
        if kind not in ENCODINGS:
            raise CheckpointError(
                f"{source}, the configuration of {file.name}, is of a {kind}; expected "
                f"{', '.join(ENCODINGS)}."
            )
        return folder

    def write(self, file: Checkpoint, configuration: Path, folder: Path) -> None:
        """See `SingleFileReader`; every part keeps the dtype that the file stores it in."""
        import diffusers  # seconds to import

        stored = _dtypes(file)
        widest = next(dtype for dtype in WIDEST if dtype in stored.values())
        index = read_model_index(configuration)
        lent = _lent(file, configuration, index)
        pipeline_class: Any = getattr(diffusers, index["_class_name"])
        with load_errors(file.name, "parts", hint=OF_ITS_KIND):
            try:
                pipeline = pipeline_class.from_single_file(
                    file.name, config=str(configuration), dtype=widest, local_files_only=True,
                    safety_checker=None, **lent,
                )  # fmt: skip
            except NotImplementedError as problem:  # a tensor without data is moved
                raise _lacking(file, configuration, "a tensor") from problem
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module) and name not in lent:
                _require_whole(file, configuration, name, part)
                kind = "text_encoder" if name.startswith("text_encoder") else name
                torch.nn.Module.to(part, stored[kind if kind in OTHER_PARTS else ""])
        pipeline.save_pretrained(folder, max_shard_size=SHARD_SIZE)


def _guess(file: Checkpoint) -> str:
    """The hub id of diffusers' own table, by names and shapes."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    shapes = {n: torch.empty(i.shape, device="meta") for n, i in file.tensors.items()}
    fetched: dict[str, str] = fetch_diffusers_config(shapes)
    return fetched["pretrained_model_name_or_path"]


def _download(file: Checkpoint, hub_id: str, guess: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=CONFIG_FILES))
    except Exception as problem:  # the hub's many errors all mean: not to be had
        why = "by its tensors' names" if guess else "as single_file_config says"
        raise CheckpointError(
            f"{file.name} has the configuration of {hub_id} ({why}), which is not a local folder, and the "
            f"hub did not provide it ({type(problem).__name__}); pass single_file_config with the folder of "
            f"a pipeline of its kind."
        ) from problem


def _part(name: str) -> str | None:
    """`vae`, `text_encoder`, nothing for the denoiser's; None for what no pipeline has."""
    for part, prefixes in OTHER_PARTS.items():
        if name.startswith(prefixes):
            return part
    return None if "." not in name or name.startswith("model_ema.") else ""


def _dtypes(file: Checkpoint) -> dict[str, torch.dtype]:
    """The widest dtype of each part: beside float16 weights, some files keep single float32 ones."""
    bytes_by_part: dict[str, dict[torch.dtype, int]] = {}
    for name, info in file.tensors.items():
        part = _part(name)
        if part is None or not info.dtype.is_floating_point:
            continue
        if info.dtype not in WIDEST:
            raise CheckpointError(
                f"{file.name} is quantised ({name} is {info.dtype}); use the file in float32, bfloat16 or "
                f"float16."
            )
        sizes = bytes_by_part.setdefault(part, {})
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    if not bytes_by_part.get(""):
        raise CheckpointError(f"{file.name} holds no denoiser; pass a file of the whole model.")
    return {
        part: next(dtype for dtype in WIDEST if dtype in sizes)
        for part, sizes in bytes_by_part.items()
    }


def _lent(file: Checkpoint, configuration: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """VAE and text encoders that the file lacks, as the configuration's folder stores them."""
    import transformers
    from diffusers import AutoencoderKL

    check_libraries(configuration, index, ("text_encoder",))
    texts = [name for name in file.tensors if _part(name) == "text_encoder"]
    holds_t5 = any(name.startswith(T5) for name in texts)
    holds_clip = any(not name.startswith(T5) for name in texts)
    lent: dict[str, Any] = {}
    for name, kind in index.items():
        if not name.startswith("text_encoder") or kind[0] is None:
            continue
        if not (holds_t5 if str(kind[1]).startswith("T5") else holds_clip):
            encoder_class: Any = getattr(transformers, str(kind[1]))
            with load_errors(configuration, f"{name}, which {Path(file.name).name} lacks,"):
                lent[name] = whole_part(configuration, name, encoder_class, dtype="auto")
    if not any(_part(name) == "vae" for name in file.tensors):
        with load_errors(configuration, f"VAE, which {Path(file.name).name} lacks,"):
            lent["vae"] = whole_part(configuration, "vae", AutoencoderKL)
    return lent


def _require_whole(file: Checkpoint, configuration: Path, name: str, part: Any) -> None:
    if hasattr(part, "tie_weights"):
        part.tie_weights()
    for parameter, value in part.named_parameters():
        if value.is_meta:
            raise _lacking(file, configuration, f"{parameter} of the {name}")


def _lacking(file: Checkpoint, configuration: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file.name} lacks {what} that the configuration {configuration} describes; {OF_ITS_KIND}."
    )
