"""One image of a data set: where it is, and how it is opened."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from emloc.errors import DataError


@dataclass(frozen=True)
class ImageRef:
    """An image that is opened when it is needed.

    Attributes:
        source: a path, the bytes of a file, or a PIL image.
        where: file and line, or data set and row, for messages.
    """

    source: Any
    where: str

    def open(self) -> Image.Image:
        """The image in RGB.

        Raises:
            DataError: missing or not an image; names file and line.
        """
        try:
            if isinstance(self.source, Image.Image):
                return self.source.convert("RGB")
            content: Any = (
                io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
            )
            with Image.open(content) as image:
                return image.convert("RGB")
        except FileNotFoundError as problem:
            raise DataError(
                f"{self.where}: there is no image {self.source}; correct the path, set image_folder, or "
                f"pass on_bad_image=skip."
            ) from problem
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as problem:
            name = self.source if isinstance(self.source, (str, Path)) else "in the row"
            raise DataError(
                f"{self.where}: the image {name} cannot be read "
                f"({str(problem).strip().splitlines()[0]}); replace it, or pass on_bad_image=skip."
            ) from problem
