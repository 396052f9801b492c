"""Parts of a diffusers pipeline folder, by what its `model_index.json` says; never the whole pipeline."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from emloc.artefacts.json_files import read_json
from emloc.artefacts.layout import PIPELINE_NAME, components
from emloc.artefacts.modest_config import require_modest_depth
from emloc.artefacts.named_files import named_path
from emloc.artefacts.whole_weights import require_whole
from emloc.errors import CheckpointError

# Parts are imported by the name that the folder gives: nothing but these two is.
LIBRARIES = ("diffusers", "transformers")


def read_model_index(folder: str | Path) -> Mapping[str, Any]:
    """`model_index.json`: the pipeline's `_class_name`, and per component its library and class, both None
    when it is left out.

    Raises:
        CheckpointError: it is missing or is not a JSON object, a component or a file in it lies elsewhere, or
            a component's config is of no model.
    """
    path = Path(folder)
    if not (path / PIPELINE_NAME).is_file():
        raise CheckpointError(
            f"{folder} has no {PIPELINE_NAME}; pass the folder of a diffusers pipeline."
        )
    for name in components(path):  # a folder may lend parts without being opened as a model
        for entry in (path / name).glob("*"):
            named_path(path, f"{name}/{entry.name}", path / PIPELINE_NAME)
        if (path / name / "config.json").is_file():
            config = path / name / "config.json"
            require_modest_depth(read_json(config), config)
    return read_json(path / PIPELINE_NAME)


def whole_part(folder: str | Path, name: str, part_class: Any, **options: Any) -> Any:
    """A part of a pipeline, with all of its parameters out of its own files.

    Args:
        part_class: of diffusers or transformers.
        options: of its `from_pretrained`.

    Raises:
        CheckpointError: a parameter is in none of the files, and the library would draw it at random.
    """
    part, report = part_class.from_pretrained(
        str(folder), subfolder=name, local_files_only=True, use_safetensors=True,
        output_loading_info=True, **options,
    )  # fmt: skip
    require_whole(Path(folder) / name, report["missing_keys"])
    return part


def check_libraries(folder: str | Path, index: Mapping[str, Any], parts: tuple[str, ...]) -> None:
    """Components whose names begin with one of `parts` are of known libraries, or left out.

    Raises:
        CheckpointError: names the one that is not.
    """
    for name, value in index.items():
        if name.startswith(parts) and value[0] is not None and value[0] not in LIBRARIES:
            raise CheckpointError(
                f"{folder}: the component {name} is from {value[0]}; only components from "
                f"{' and '.join(LIBRARIES)} are loaded."
            )


@contextmanager
def load_errors(
    folder: str | Path,
    what: str,
    hint: str = "check that the folder is complete and has safetensors files",
) -> Iterator[None]:
    """Turn what the libraries raise while they load into one sentence.

    Args:
        folder: what is loaded from.
        what: a part of it.
        hint: what to do.

    Raises:
        CheckpointError: instead of any of theirs.
    """
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        AttributeError,
        SafetensorError,
    ) as problem:
        if isinstance(problem, (torch.OutOfMemoryError, CheckpointError)):
            raise
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise CheckpointError(
            f"{folder}: its {what} cannot be loaded ({reason}); {hint}."
        ) from problem


def release() -> None:
    """Give back what a part held, once the last name for it is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
