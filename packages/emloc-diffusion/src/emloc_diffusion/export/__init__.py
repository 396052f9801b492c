"""A PEFT LoRA of a denoiser in the files that image programs load.

`pytorch_lora_weights.safetensors` is diffusers' own (`pipe.load_lora_weights(folder)`);
`kohya_lora.safetensors` is what most other programs read, and diffusers with
`pipe.load_lora_weights(folder, weight_name="kohya_lora.safetensors")`. Both hold the adapter's tensors
under other names and in the same dtypes; they differ in where the scaling `alpha / rank` is kept, which
`diffusers_format` and `kohya_format` explain.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.file_digest import file_sha256
from emloc.artefacts.write_errors import others_writing, writing
from emloc.errors import ConfigError, MismatchError, OutputError
from emloc.linalg.finite import require_writable
from emloc_diffusion.export.diffusers_format import diffusers_file
from emloc_diffusion.export.kohya_format import kohya_file

__all__ = ["DIFFUSERS_NAME", "FORMATS", "KOHYA_NAME", "export_adapter"]

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "kohya_lora.safetensors"
"""Must not end like diffusers' name, by which diffusers chooses among the files of a folder."""

FORMATS: Mapping[str, Sequence[str]] = {
    "unet": ("diffusers", "kohya"),
    # kohya's layouts of SD3 and FLUX are another one each, with fused layers; diffusers reads none of SD3.
    "transformer": ("diffusers",),
}
"""The formats of each kind of denoiser, by the name that pipelines give it."""

ENCODERS = ("text_encoder", "text_encoder_2")

Parts = Mapping[str, Adapter]
File = tuple[dict[str, Tensor], dict[str, str]]
_WRITERS: Mapping[str, tuple[str, Callable[[Parts], File]]] = {
    "diffusers": (DIFFUSERS_NAME, diffusers_file),
    "kohya": (KOHYA_NAME, kohya_file),
}


def export_adapter(
    folder: Path,
    component: str,
    formats: Sequence[str] | None = None,
    out: Path | None = None,
) -> list[Path]:
    """Write a PEFT adapter in other formats; each file appears complete or not at all.

    Args:
        folder: the denoiser's adapter as PEFT saves it; text encoders' adapters are taken from its
            subfolders `text_encoder` and `text_encoder_2`, where there are any.
        component: what pipelines call the denoiser, `unet` or `transformer`.
        formats: of `FORMATS[component]`; all of these when None.
        out: where to write; `folder` itself when None.

    Returns:
        The files, in the order of `formats`. One that is there already with this content stays.

    Raises:
        CheckpointError: a folder does not hold a complete adapter.
        ConfigError: no such component, or a format that it does not have.
        MismatchError: the adapter holds something that the format cannot say.
        NumericalError: a tensor does not fit its dtype once the scaling is in it.
        OutputError: another file is in the way, or it cannot be written.
    """
    if component not in FORMATS:
        raise ConfigError(f"No component {component}; there are {', '.join(FORMATS)}.")
    formats = FORMATS[component] if formats is None else formats
    for name in formats:
        if name in FORMATS[component]:
            continue
        if name in _WRITERS:
            raise ConfigError(
                f"The format {name} is written for UNets only (Stable Diffusion and SDXL); for the adapter "
                f"of a {component} there is {', '.join(FORMATS[component])}."
            )
        raise ConfigError(f"No format {name}; there are {', '.join(_WRITERS)}.")
    parts = {component: folder, **{n: folder / n for n in ENCODERS if (folder / n).is_dir()}}
    adapters = {part: _open(path) for part, path in parts.items()}
    target = folder if out is None else out
    # All files are made before the first is written: what cannot be said in one of them stops it all.
    made = [(target / _WRITERS[name][0], *_WRITERS[name][1](adapters)) for name in formats]
    for path, tensors, metadata in made:
        _write(path, tensors, metadata)
    return [path for path, _, _ in made]


def _open(folder: Path) -> Adapter:
    adapter = Adapter.open(str(folder))
    if adapter.copies:
        raise MismatchError(
            f"{folder} holds {next(iter(adapter.copies.values()))}, which is not LoRA and cannot be stored "
            f"in files for pipelines; save the adapter with save_embedding_layers=False."
        )
    if adapter.saved:
        raise MismatchError(
            f"{folder} holds {next(iter(adapter.saved))}, trained whole (modules_to_save), which cannot be "
            f"stored in files for pipelines; train without modules_to_save."
        )
    return adapter


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    for name, tensor in tensors.items():
        require_writable(name, tensor, str(path.parent))
    temporary = path.with_name(path.name + ".tmp")
    with writing(path), others_writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({n: tensors[n].contiguous() for n in sorted(tensors)}, temporary, metadata)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            if path.exists():
                if file_sha256(path) != file_sha256(temporary):
                    raise OutputError(
                        f"{path} exists and holds something else; nothing is ever overwritten, so "
                        f"choose another folder or remove it."
                    )
                return
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
