"""Tiles that the images of one sample share, as in the data sets of OpenGVLab's training code.

There an image that is alone is cut into `max_dynamic_patch` tiles at most, and one of several into
`max(1, max_dynamic_patch // count)`. transformers' processor knows one number for all.
"""

from functools import cache
from typing import Any


@cache
def with_shares(kind: Any) -> Any:
    """An image processor's class that cuts each image into no more tiles than are its share.

    It saves itself under the original's name, as does `sharing_tiles`.
    """

    def crop(self: Any, image: Any, min_patches: int, max_patches: int, **more: Any) -> Any:
        count = self.shared_by.pop(0) if self.shared_by else 1
        share = max(1, max_patches // count)
        return kind.crop_image_to_patches(self, image, min(min_patches, share), share, **more)

    return type(kind.__name__, (kind,), {"crop_image_to_patches": crop, "shared_by": []})


@cache
def sharing_tiles(kind: Any) -> Any:
    """A processor's class that tells its image processor, one of `with_shares`, how many share tiles."""

    def call(self: Any, images: Any = None, text: Any = None, **more: Any) -> Any:
        self.image_processor.shared_by = _counts(images)
        try:
            return kind.__call__(self, images=images, text=text, **more)
        finally:
            del self.image_processor.shared_by  # or it would be saved

    return type(kind.__name__, (kind,), {"__call__": call})


def _counts(images: Any) -> list[int]:
    """The number of images of each one's sample; images that are not in lists are alone."""
    if not isinstance(images, list | tuple):
        return []
    samples = [one if isinstance(one, list | tuple) else [one] for one in images]
    return [len(sample) for sample in samples for _ in sample]
