"""The processor of a model's folder: tokenizer, chat template, and how images become tensors.

transformers' processors of models that also read videos want a video processor, which needs
torchvision. Images do not: where torchvision cannot be imported, the same processor is built without
videos, on the image processors that need only Pillow. So it is where a folder has no video processor, as
one that was saved without torchvision.
"""

from pathlib import Path
from typing import Any, cast

import transformers
from transformers import AutoProcessor, ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

from emloc.artefacts.json_files import read_json
from emloc.artefacts.read_errors import reading
from emloc.errors import CheckpointError
from emloc.integrations.transformers.loading import give_padding
from emloc_vlm.image_only import image_only
from emloc_vlm.internvl_chat import has_original_processor, native_processor
from emloc_vlm.picture_sizes import require_few_places, require_modest


def load_processor(path: Path, max_dynamic_patch: int | None = None) -> Any:
    """The processor of a model's folder, with a padding token.

    Args:
        max_dynamic_patch: tiles per image at most, where the processor cuts images into tiles.

    Raises:
        CheckpointError: there is none that transformers can build, or it would make pictures too large.
    """
    hint = "copy preprocessor_config.json, the tokenizer's files and the chat template there"
    with reading(path, "has no processor that transformers can build", hint):
        processor = _load(path)
    tokenizer = processor.tokenizer
    give_padding(tokenizer, path)
    if max_dynamic_patch is not None:
        if not hasattr(processor.image_processor, "max_patches"):
            raise CheckpointError(
                f"max_dynamic_patch: the processor of {path} does not cut images into tiles; leave it "
                f"out."
            )
        processor.image_processor.max_patches = max_dynamic_patch
    require_modest(processor.image_processor, path)
    require_few_places(processor, path)
    return processor


def _load(path: Path) -> Any:
    config: dict[str, Any] = {}
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
    if has_original_processor(config):
        return native_processor(path)
    if is_torchvision_available():
        try:
            return AutoProcessor.from_pretrained(path, trust_remote_code=False)
        except OSError:
            if "video_processor" not in _class_of(path, config).get_attributes():
                raise
    return image_only(_class_of(path, config)).from_pretrained(path, trust_remote_code=False)


def _class_of(path: Path, config: dict[str, Any]) -> type[ProcessorMixin]:
    """The class that the folder's files name, or the one that goes with the model."""
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (path / file).is_file():
            name = read_json(path / file).get("processor_class")
            if name and hasattr(transformers, name):
                return cast("type[ProcessorMixin]", getattr(transformers, name))
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(str(config.get("model_type")))
    if name is None:
        raise ValueError("its files name no processor")
    return cast("type[ProcessorMixin]", getattr(transformers, str(name)))
