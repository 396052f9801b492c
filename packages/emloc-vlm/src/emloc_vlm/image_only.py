"""Processors of models that also read videos, without videos: video processors need torchvision."""

from functools import cache
from typing import Any


@cache
def image_only(kind: Any) -> Any:
    """A processor's class without videos; it saves itself under the original's name."""

    def get_attributes(cls: Any) -> list[str]:
        names = super(made, cls).get_attributes()
        return [name for name in names if name != "video_processor"]

    made: Any = type(kind.__name__, (kind,), {"get_attributes": classmethod(get_attributes)})
    return made
