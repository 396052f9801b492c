"""The prompts of the DreamBooth data set (github.com/google/dreambooth, prompts_and_classes.txt).

25 for things and 25 for live subjects; they share the ten scenes at the start and the five changes of
look at the end. `{0}` is the unique token of the subject, `{1}` the noun of its class. Or prompts of one's
own, out of a file.
"""

import re
from pathlib import Path

from emloc.errors import ConfigError, DataError
from emloc.machine.special_files import refuse_special

_SCENES = (
    "a {0} {1} in the jungle",
    "a {0} {1} in the snow",
    "a {0} {1} on the beach",
    "a {0} {1} on a cobblestone street",
    "a {0} {1} on top of pink fabric",
    "a {0} {1} on top of a wooden floor",
    "a {0} {1} with a city in the background",
    "a {0} {1} with a mountain in the background",
    "a {0} {1} with a blue house in the background",
    "a {0} {1} on top of a purple rug in a forest",
)

_LOOKS = (
    "a red {0} {1}",
    "a purple {0} {1}",
    "a shiny {0} {1}",
    "a wet {0} {1}",
    "a cube shaped {0} {1}",
)

OBJECT_PROMPTS: tuple[str, ...] = (
    *_SCENES,
    "a {0} {1} with a wheat field in the background",
    "a {0} {1} with a tree and autumn leaves in the background",
    "a {0} {1} with the Eiffel Tower in the background",
    "a {0} {1} floating on top of water",
    "a {0} {1} floating in an ocean of milk",
    "a {0} {1} on top of green grass with sunflowers around it",
    "a {0} {1} on top of a mirror",
    "a {0} {1} on top of the sidewalk in a crowded street",
    "a {0} {1} on top of a dirt road",
    "a {0} {1} on top of a white rug",
    *_LOOKS,
)
"""Templates for things: backpacks, vases, toys."""

LIVE_PROMPTS: tuple[str, ...] = (
    *_SCENES,
    "a {0} {1} wearing a red hat",
    "a {0} {1} wearing a santa hat",
    "a {0} {1} wearing a rainbow scarf",
    "a {0} {1} wearing a black top hat and a monocle",
    "a {0} {1} in a chef outfit",
    "a {0} {1} in a firefighter outfit",
    "a {0} {1} in a police outfit",
    "a {0} {1} wearing pink glasses",
    "a {0} {1} wearing a yellow shirt",
    "a {0} {1} in a purple wizard outfit",
    *_LOOKS,
)
"""Templates for live subjects: cats and dogs."""


def evaluation_prompts(unique_token: str, class_noun: str, live: bool) -> list[str]:
    """The 25 prompts to generate from, such as `a sks dog in the jungle`.

    Args:
        unique_token: what the adapter was trained to know the subject by.
        class_noun: what the subject is: `dog`, `backpack`, `stuffed animal`.
        live: whether it is a living being, which has prompts of its own.

    Raises:
        ConfigError: token or noun is empty.
    """
    token = _words("subject_token", unique_token)
    noun = _words("class_name", class_noun)
    return [template.format(token, noun) for template in _templates(live)]


def plain_prompts(class_noun: str, live: bool) -> list[str]:
    """The same prompts in the same order without the unique token, such as `a dog in the jungle`.

    CLIP's text encoder does not know the token, so the fidelity to a prompt is measured with these.

    Raises:
        ConfigError: the noun is empty.
    """
    noun = _words("class_name", class_noun)
    return [template.replace("{0} ", "").format("", noun) for template in _templates(live)]


def own_prompts(path: Path, unique_token: str) -> dict[str, str]:
    """The prompts of a text file, one per line, each with what it says without the unique token.

    Raises:
        ConfigError: the token is empty.
        DataError: the file cannot be read or has no prompts; a line does not name the subject, or says
            nothing else, or is there twice; says which.
    """
    token = _words("subject_token", unique_token)
    refuse_special(path, DataError)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"prompts_file: {path} cannot be read as UTF-8 text.") from problem
    word = re.compile(rf"(?<!\w){re.escape(token)}(?!\w)")
    prompts: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        prompt = " ".join(line.split())
        if not prompt:
            continue
        plain = " ".join(word.sub(" ", prompt).split())
        if plain == prompt:
            raise DataError(
                f"{path}, line {number}: {prompt!r} does not name the subject; put {token!r} into it."
            )
        if not plain or prompt in prompts:
            reason = "occurs twice" if plain else f"says nothing besides {token!r}"
            raise DataError(f"{path}, line {number}: {prompt!r} {reason}; change it.")
        prompts[prompt] = plain
    if not prompts:
        raise DataError(f"prompts_file: {path} has no prompts; write one per line.")
    return prompts


def _templates(live: bool) -> tuple[str, ...]:
    return LIVE_PROMPTS if live else OBJECT_PROMPTS


def _words(option: str, value: str) -> str:
    words = value.strip()
    if not words:
        raise ConfigError(f"{option} is empty; prompts such as 'a sks dog in the snow' need it.")
    return words
