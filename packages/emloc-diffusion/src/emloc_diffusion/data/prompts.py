"""The words for what a picture shows: one prompt for all, or a text file beside each; and a check that the
prompt of a new subject names it by a word that the model does not know yet.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emloc.artefacts.named_files import named_path
from emloc.errors import ConfigError, DataError
from emloc.machine.progress import warn

# Words that say how a subject is shown, never which one it is.
ORDINARY_WORDS = """
a an the of in on at with and or by from to for my your his her our their its this that one some
photo photograph picture image drawing painting illustration sketch portrait render rendering
style closeup close up high quality
"""
ORDINARY = frozenset(ORDINARY_WORDS.split())
# Vocabularies are ordered by how frequent a token was: the first fifth are everyday words.
COMMON_SHARE = 0.2


def read_caption(picture: Path) -> str:
    """The text of `name.txt` beside `name.png`, on one line.

    Raises:
        DataError: there is no such file, it is a link out of the folder or a pipe, or not UTF-8; names it.
    """
    name = picture.with_suffix(".txt").name
    path = named_path(picture.parent, name, f"{picture.parent}, {picture.name}", DataError)
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError as problem:
        raise DataError(
            f"{picture}: its caption {path.name} is missing; write it, or set instance_prompt for all "
            f"pictures."
        ) from problem
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(
            f"{path}: the caption cannot be read as UTF-8 text; save it as UTF-8."
        ) from problem


def check_unique_token(
    instance_prompt: str, class_prompt: str | None = None, tokenizer: Any = None
) -> tuple[str, ...]:
    """The words of `instance_prompt` that name the new subject and nothing else.

    Args:
        instance_prompt: such as `a photo of sks dog`.
        class_prompt: such as `a photo of dog`; what is in it names the class.
        tokenizer: the model's, if at hand; with it, a prompt of everyday words alone brings a warning.

    Raises:
        ConfigError: the prompts are the same, or no word is left that could name the subject.
    """
    words = _words(instance_prompt)
    if class_prompt is not None and words == _words(class_prompt):
        raise ConfigError(
            f"instance_prompt and class_prompt are the same ({instance_prompt!r}), so the subject cannot be "
            f"told apart from its class; add a rare word for it, such as {_improved(instance_prompt)!r}."
        )
    of_class = set(_words(class_prompt or ""))
    unique = tuple(
        word for word in dict.fromkeys(words) if word not in of_class and word not in ORDINARY
    )
    if not unique:
        raise ConfigError(
            f"instance_prompt {instance_prompt!r} has no word of its own for the subject; add a rare one, "
            f"such as {_improved(instance_prompt)!r}."
        )
    if tokenizer is not None and not any(_is_rare(word, tokenizer) for word in unique):
        warn(
            f"the words of instance_prompt {instance_prompt!r} are "
            f"everyday ones, whose meaning training will change; a rare word for the subject, such as "
            f"sks, is safer"
        )
    return unique


def _words(prompt: str) -> Sequence[str]:
    # Placeholders are often written <cat-toy> or [V].
    return re.findall(r"<[^<>\s]+>|\[[^\[\]\s]+\]|[\w'-]+", prompt.lower())


def _is_rare(word: str, tokenizer: Any) -> bool:
    """Split by the tokenizer, or late in its vocabulary."""
    tokens: Sequence[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
    return len(tokens) != 1 or tokens[0] >= COMMON_SHARE * len(tokenizer)


def _improved(prompt: str) -> str:
    """`prompt` with sks before its last word."""
    *head, last = prompt.split() or ["subject"]
    return " ".join([*head, "sks", last])
