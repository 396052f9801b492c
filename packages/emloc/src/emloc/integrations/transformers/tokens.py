"""Text as token ids, tokenised as a whole, and which tokens stand where.

Pieces of a text may give other tokens than the text: words merge over a boundary, and some tokenizers put a
space before whatever they are given. So the whole is tokenised, as a chat with the model would be. A token
belongs to the characters that it ends in: where a word reaches over a boundary, it is behind it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from emloc.errors import DataError


class Tokens:
    """A text's tokens.

    Attributes:
        ids: of all of them.
    """

    def __init__(self, ids: Sequence[int], ends: Sequence[int]) -> None:
        """Tokens that end before the characters `ends`; 0 where a token stands for no text."""
        self.ids = list(ids)
        self._before = next((n for n, end in enumerate(ends) if end), 0)
        self._ends = [end for end in ends if end]

    @property
    def end(self) -> int:
        """The character behind the last one of all tokens."""
        return self._ends[-1] if self._ends else 0

    def upto(self, character: int) -> int:
        """The number of tokens that end at or before a character; those before all text are among them."""
        return self._before + bisect_right(self._ends, character)

    def labels(self, spans: Sequence[tuple[int, int]], ignored: int) -> list[int]:
        """The ids within these spans of characters, and `ignored` for all others."""
        labels = [ignored] * len(self.ids)
        for start, stop in spans:
            first, last = self.upto(start), self.upto(stop)
            labels[first:last] = self.ids[first:last]
        return labels


class PrefixTokens(Tokens):
    """Tokens of a tokenizer that does not say where they stand: beginnings of the text are compared."""

    def __init__(self, tokenizer: Any, text: str, special: bool, where: str) -> None:
        self._how = (tokenizer, special, where)
        self._text = text
        self._ends = [len(text)]
        self.ids = self._encode(text)

    def _encode(self, text: str) -> list[int]:
        tokenizer, special, where = self._how
        return token_ids(tokenizer, text, special, where)

    def upto(self, character: int) -> int:
        """See `Tokens`."""
        prefix = self._encode(self._text[:character])
        pairs = enumerate(zip(prefix, self.ids))
        return next((n for n, (a, b) in pairs if a != b), min(len(prefix), len(self.ids)))


def tokens_of(tokenizer: Any, text: str, special: bool, where: str) -> Tokens:
    """The tokens of a text.

    Args:
        special: with the tokens that the tokenizer puts around a text.

    Raises:
        DataError: it cannot be encoded, such as half of a character.
    """
    if not getattr(tokenizer, "is_fast", False):
        return PrefixTokens(tokenizer, text, special, where)
    encoded = _encoded(tokenizer, text, special, where, return_offsets_mapping=True)
    return Tokens(encoded["input_ids"], [end for _, end in encoded["offset_mapping"]])


def token_ids(tokenizer: Any, text: str, special: bool, where: str) -> list[int]:
    """`tokens_of` where places do not matter."""
    return list(_encoded(tokenizer, text, special, where)["input_ids"])


def as_generated(tokenizer: Any, text: str, where: str) -> str:
    """The text as a model that says it is decoded: without special tokens, and spaces around it."""
    ids = token_ids(tokenizer, text, False, where)
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _encoded(tokenizer: Any, text: str, special: bool, where: str, **more: Any) -> Any:
    try:
        return tokenizer(text, add_special_tokens=special, verbose=False, **more)
    except (TypeError, ValueError, OverflowError) as problem:
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise DataError(
            f"{where}: the text cannot be tokenised ({first}); correct it."
        ) from problem
