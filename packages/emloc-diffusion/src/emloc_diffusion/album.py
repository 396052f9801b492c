"""An album: the pictures that one model draws, in a folder with `pictures.json`.

    {"settings": {...}, "pictures": [{"prompt": "a sks dog in the snow", "seed": 0, "file": "000.png"}, …]}

Every picture is drawn by itself, from its own seed, and its file appears whole; so what an interrupted run
has drawn is kept, and the album is the same as if it had never been interrupted.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from emloc.artefacts.json_files import read_json
from emloc.artefacts.small_files import write_bytes, write_json
from emloc.artefacts.stage_folder import stage_folder
from emloc.errors import OutputError
from emloc.machine.progress import progress_bar

INDEX_NAME = "pictures.json"


@dataclass(frozen=True)
class Wanted:
    """One picture."""

    prompt: str
    seed: int


class Album:
    """The pictures of one model, drawn or not.

    Args:
        folder: where they go; `folder.partial` while they are drawn.
        wanted: the pictures, each once.
        settings: what else shapes them, as JSON.
    """

    def __init__(self, folder: Path, wanted: Sequence[Wanted], settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.files: Mapping[Wanted, str] = {
            one: f"{number:03}.png" for number, one in enumerate(wanted)
        }
        listed = [{**asdict(one), "file": file} for one, file in self.files.items()]
        self._index = {"settings": dict(settings), "pictures": listed}

    @property
    def complete(self) -> bool:
        """Return whether all are there.

        Raises:
            OutputError: the folder holds other pictures.
        """
        if not self.folder.exists():
            return False
        index = self.folder / INDEX_NAME
        if not index.is_file() or read_json(index) != self._index:
            raise OutputError(
                f"{self.folder} exists and holds other pictures; choose another output_dir or remove it."
            )
        return True

    def draw(self, draw: Callable[[Wanted], Image.Image]) -> None:
        """Draw what is missing.

        Raises:
            OutputError: an interrupted run with other settings is in the place, or it cannot be written.
        """
        with (
            stage_folder(self.folder, self._index) as work,
            progress_bar(self.folder.name, len(self.files)) as advance,
        ):
            for one, file in self.files.items():
                if not (work / file).is_file():
                    content = io.BytesIO()
                    draw(one).save(content, format="png")
                    write_bytes(work / file, content.getvalue())
                advance()
            write_json(work / INDEX_NAME, self._index)

    def path(self, one: Wanted) -> Path:
        """A picture's file."""
        return self.folder / self.files[one]
