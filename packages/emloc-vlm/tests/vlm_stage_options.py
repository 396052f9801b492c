"""Options of a stage as the family of vision-language models has them."""

from types import SimpleNamespace

from emloc.config import CompressConfig
from emloc.extend.plugin_options import with_family_options


def visual_options(stage=CompressConfig, **given):
    kind = with_family_options(stage, SimpleNamespace(name="vlm"))
    return kind(model_name_or_path="m", output_dir="o", **given)
