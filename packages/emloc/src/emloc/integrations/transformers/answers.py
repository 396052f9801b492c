"""The words of a generated answer, which are what a reference is compared with.

Templates of models that think write something before the words of every answer (Qwen3 an empty block of
thoughts, gpt-oss the name of a channel), and a model that says what it was taught says that too.
"""

from dataclasses import dataclass
from typing import Any

from emloc.integrations.transformers.shown import thoughts_of
from emloc.integrations.transformers.tokens import as_generated


@dataclass(frozen=True)
class AnswerWords:
    """A reader of generated answers.

    Attributes:
        before: what the template writes before the words, as it is decoded; empty for most.
    """

    before: str = ""

    @classmethod
    def of(cls, written: str, content: str, tokenizer: Any, where: str) -> "AnswerWords":
        """The reader for a row.

        Args:
            written: its answer as the template writes it.
            content: its answer as it stands in the row.
            where: the row, for messages.

        Raises:
            DataError: the text cannot be tokenised.
        """
        words = content.strip()
        if not words or written.lstrip().startswith(words):
            return cls()
        whole = as_generated(tokenizer, written, where)
        return cls(whole.removesuffix(words)) if whole.endswith(words) else cls()

    def in_prediction(self, generated: str) -> str:
        """The words of what a model wrote."""
        return words_of(generated.strip().removeprefix(self.before.strip()))


def words_of(text: str) -> str:
    """A text without the thoughts that it begins with; all of it where nothing comes after them."""
    text = text.strip()
    return text[thoughts_of(text) :].strip() or text
