"""Files that belong to a model beside its weights and travel with everything that is made of it.

They decide what the model reads and writes: tokenizer, chat templates, processors, generation settings; of
a pipeline, all of its other models. What is copied is what people publish, so a link that leads out of the
model's folder is refused: it would put somebody's own file into the artefact.
"""

from collections.abc import Iterator
from pathlib import Path

from emloc.artefacts.json_files import read_json, read_text
from emloc.artefacts.layout import PIPELINE_NAME, Layout, components
from emloc.artefacts.named_files import named_file
from emloc.machine.progress import warn

SUFFIXES = frozenset(
    {
        ".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".bpe", ".codes", ".vocab", ".tokenizer",
    }
)  # fmt: skip
"""Endings of the files of transformers' tokenizers, templates, processors and settings."""

TEMPLATES = "additional_chat_templates"
"""The folder of a model's further chat templates, such as the one for tools."""

PATTERNS = [*(f"*{suffix}" for suffix in sorted(SUFFIXES)), "tokenizer.model.*"]
"""Patterns of those files, for a download."""

_SKIPPED = {"config.json", "emloc.json"}
_OTHER_WEIGHTS = {".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".pkl", ".pt", ".pth"}


def companions(path: Path, layout: Layout) -> list[str]:
    """Names of a model's companions, relative to its folder, in order.

    Raises:
        CheckpointError: one is a link out of the folder.
    """
    names = _of_pipeline(path, layout) if layout.folder else _of_model(path)
    names = sorted(names)
    for name in names:
        named_file(path, name, path)
    return names


def _of_model(path: Path) -> Iterator[str]:
    for entry in path.iterdir():
        belongs = entry.suffix in SUFFIXES or entry.name.startswith("tokenizer.model.")
        if belongs and entry.is_file() and not _is_skipped(entry.name):
            yield entry.name
    for entry in (path / TEMPLATES).glob("*.jinja"):
        yield f"{TEMPLATES}/{entry.name}"


def _is_skipped(name: str) -> bool:
    return name in _SKIPPED or name.endswith(".index.json")


def _of_pipeline(path: Path, layout: Layout) -> Iterator[str]:
    """Files that the pipeline's index names; no training output and no single-file copy beside it."""
    yield PIPELINE_NAME
    for component in components(path):
        if f"{component}/" == layout.folder or not (path / component).is_dir():
            continue
        for entry in (path / component).rglob("*"):
            hidden = any(part.startswith(".") for part in entry.relative_to(path).parts)
            if entry.is_file() and not hidden and entry.suffix not in _OTHER_WEIGHTS:
                yield entry.relative_to(path).as_posix()


def say_other_template(adapter: Path, model: Path) -> None:
    """Say that an adapter was trained with another chat template than the model's, which is the one used."""
    trained, used = chat_template(adapter), chat_template(model)
    if trained is not None and trained != used:
        warn(
            f"{adapter} holds {'another' if used else 'a'} chat template {'than' if used else 'and not'} "
            f"{model}, whose folder decides how chats are read; copy chat_template.jinja there if the "
            f"adapter was trained with it"
        )


def chat_template(folder: Path) -> str | None:
    """The chat template in a folder of a model or an adapter, wherever its files keep it; None without one.

    Raises:
        CheckpointError: a file that may hold it cannot be read.
    """
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, str):
                return template
    return None
