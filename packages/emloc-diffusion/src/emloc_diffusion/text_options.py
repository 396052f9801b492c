"""Options of core that mean something for rows of data sets, and not for folders of pictures: refused where
they are set, never ignored."""

from typing import cast

from pydantic import BaseModel

from emloc.errors import ConfigError

# max_new_tokens is not among them: a bench sets it for whatever it evaluates.
TEXT_ONLY = (
    "max_length", "streaming", "column_map",
    "dataset_split", "dataset_weights", "eval_dataset", "eval_dataset_split", "eval_steps",
    "num_calibration_tokens",
)  # fmt: skip


def refuse_text_options(stage: str, options: BaseModel) -> None:
    """Accept options at their defaults, set or not.

    Raises:
        ConfigError: one is set to something that pictures have no use for; names it.
    """
    fields = type(options).model_fields
    for name in TEXT_ONLY:
        if name in fields and getattr(options, name) != cast(
            object, fields[name].get_default(call_default_factory=True)
        ):
            raise ConfigError(f"{stage}: {name} is for text; leave it out with pictures.")
