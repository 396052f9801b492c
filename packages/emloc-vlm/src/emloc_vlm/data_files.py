"""The files that a visual data set names: they belong to the data as its own bytes do."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from emloc.config import EvaluateConfig
from emloc.machine.progress import console
from emloc_vlm.benchmarks import files_beside
from emloc_vlm.benchmarks.files import open_document
from emloc_vlm.rows import load_examples


def files_of_rows(options: Any, name: str, split: str) -> Iterator[Path]:
    """Annotations, then images in the order of the rows, each once; in evaluation of the rows that count.

    Args:
        name: of a file or folder.
        split: of a folder; a file has none.

    Raises:
        DataError: as `load_examples`.
    """
    document = open_document(Path(name))
    yield from _annotations(Path(name), document)
    yield from files_beside(Path(name), document)
    with console.capture():  # what is to be said of the rows is said when they are used
        examples = load_examples(options, name, "" if os.path.isfile(name) else split)
    count = options.num_samples if isinstance(options, EvaluateConfig) else None
    sources = (image.source for example in examples[:count] for image in example.images)
    yield from dict.fromkeys(source for source in sources if isinstance(source, Path))


def _annotations(path: Path, document: Any) -> Iterator[Path]:
    """Annotations of InternVL's meta file, wherever its names are taken from."""
    entries = cast("dict[str, Any]", document).values() if isinstance(document, dict) else ()
    for entry in entries:
        named = cast("dict[str, Any]", entry).get("annotation") if isinstance(entry, dict) else None
        if isinstance(named, str):
            yield from (
                path_here for path_here in (Path(named), path.parent / named) if path_here.is_file()
            )
