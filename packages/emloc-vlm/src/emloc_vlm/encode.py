"""The way from chats with images to what a model's forward takes, the same for all stages.

The processor renders the chat, opens out the images' places and makes the tensors. The whole chat is
encoded at once, as a chat with the model would be, and answers are labelled where they stand. Images are
opened when a micro-batch is made, not before.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from emloc.errors import DataError
from emloc.integrations.transformers.answers import AnswerWords
from emloc.integrations.transformers.capacity import Capacity
from emloc.integrations.transformers.chat import Rendered, render
from emloc.integrations.transformers.generation import closing_tokens
from emloc.integrations.transformers.loss import IGNORED
from emloc.integrations.transformers.tokens import Tokens, as_generated, token_ids, tokens_of
from emloc.machine.progress import warn
from emloc_vlm.examples import Example, words_in

_OF_IMAGES = ("pixel", "image")
"""Names of tensors that are no part of the text, whatever their shape."""


def collate(
    examples: Sequence[Example],
    processor: Any,
    options: Any,
    answers: bool = True,
    capacity: Capacity | None = None,
) -> dict[str, Tensor]:
    """One micro-batch: `input_ids`, `attention_mask`, `labels` (samples × longest, int64), and images.

    Args:
        answers: with the answers, padded on the right; without, for generation, padded on the left.
        capacity: the model's, to refuse samples that it has no rows for.

    Raises:
        DataError: a sample is longer than `max_length` before its answer begins, or its image cannot be
            read.
        CheckpointError: the tokenizer gives a token that the model has no row for.
    """
    chats = [_rendered(example, processor, options) for example in examples]
    texts = [chat.text if answers else chat.prompt for chat in chats]
    images = [[image.open() for image in example.images] for example in examples]
    batch, tokens = _processed(processor, texts, images, "right" if answers else "left", examples)
    lengths = [len(row_tokens.ids) for row_tokens in tokens]
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row, (example, chat, row_tokens) in enumerate(zip(examples, chats, tokens)):
        length = lengths[row]
        head = row_tokens.upto(chat.last) if answers else length
        if head >= options.max_length:
            raise DataError(
                f"{example.where}: its prompt and images take {head} tokens, which leaves nothing of "
                f"max_length={options.max_length} for the answer; raise max_length or lower "
                f"max_dynamic_patch."
            )
        if length > options.max_length:
            _say_cut(options.max_length, example.where)
        if answers:
            everywhere = not (options.completion_only_loss or options.assistant_only_loss)
            learnt = row_tokens.ids if everywhere else row_tokens.labels(chat.answers, IGNORED)
            if not everywhere and any(
                row_tokens.upto(a) == row_tokens.upto(b) for a, b in chat.answers
            ):
                raise DataError(
                    f"{example.where}: an answer before an image cannot be found among the tokens of this "
                    f"model's processor; leave assistant_only_loss out."
                )
            labels[row, :length] = torch.tensor(learnt)
    batch["labels"] = labels
    size = tuple(labels.shape)
    longest = min(options.max_length, size[1]) if answers else size[1]
    for name, tensor in batch.items():
        of_text = tuple(tensor.shape[:2]) == size and not name.startswith(_OF_IMAGES)
        batch[name] = tensor[:, :longest] if of_text else tensor
    if capacity is not None:
        # The places of images are replaced by what the tower makes of them: they need no row.
        places = set(getattr(processor, "image_token_ids", None) or [])
        ids = ([0 if n in places else n for n in t.ids[: options.max_length]] for t in tokens)
        capacity.check(ids, processor.tokenizer, f"{examples[0].where} and on")
    return batch


def _rendered(example: Example, processor: Any, options: Any) -> Rendered:
    every, completion = options.assistant_only_loss, options.completion_only_loss
    return render(example.chat, processor, every, example.where, completion)


def references_of(example: Example, processor: Any, options: Any) -> list[str]:
    """Accepted answers of the last turn; a call of tools as the template writes it, as a model says it."""
    if example.references:
        return list(example.references)
    rendered = _rendered(example, processor, options)
    return [as_generated(processor.tokenizer, rendered.text[rendered.last :], example.where)]


def answer_words(example: Example, processor: Any, options: Any) -> AnswerWords:
    """The reader of what is generated for an example: templates may write something before the words."""
    last = example.messages[-1]
    if last.get("tool_calls"):
        return AnswerWords()
    rendered = _rendered(example, processor, options)
    written = rendered.text[rendered.last :]
    return AnswerWords.of(written, words_in(last), processor.tokenizer, example.where)


def end_tokens(examples: Sequence[Example], processor: Any, options: Any) -> set[int]:
    """The special tokens that close the answers of these chats: where generation stops, besides the
    model's own end of text (checkpoints of OpenGVLab name only that one)."""
    tokenizer = processor.tokenizer
    chats = [_rendered(example, processor, options) for example in examples]
    tails = (
        token_ids(tokenizer, chat.text[chat.last :], False, example.where)
        for example, chat in zip(examples, chats)
    )
    return closing_tokens(tails, tokenizer)


@cache
def _say_cut(max_length: int, where: str) -> None:
    """Once per sample."""
    warn(f"{where}: its answer is cut at max_length={max_length}")


def _processed(
    processor: Any,
    texts: list[str],
    images: list[list[Any]],
    side: str,
    examples: Sequence[Example],
) -> tuple[dict[str, Any], list[Tokens]]:
    """The processor's tensors, and each text's tokens by the characters of the text that was given."""
    bos = processor.tokenizer.bos_token
    # A template that writes the beginning of the sequence itself must not get a second one.
    special = not (bos and texts[0].startswith(bos))
    given: dict[str, Any] = {"images": images} if any(images) else {}
    try:
        processed: dict[str, Any] = dict(
            processor(
                text=texts,
                **given,
                padding=True,
                padding_side=side,
                return_tensors="pt",
                add_special_tokens=special,
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
            )
        )
    except MemoryError:
        raise
    except Exception as problem:  # whatever a processor of somebody's makes of it
        raise DataError(
            f"From {examples[0].where} on, the processor cannot encode a sample: "
            f"{(str(problem).strip() or type(problem).__name__).splitlines()[0]}"
        ) from problem
    mask = processed["attention_mask"].bool()
    offsets = processed.pop("offset_mapping")
    replaced: Any = processed.pop("text_replacement_offsets", None)
    if not isinstance(replaced, list) or not any(replaced):  # an empty one may have become a tensor
        replaced = None
    tokens: list[Tokens] = []
    for row, kept in enumerate(mask):
        ends = offsets[row][kept][:, 1].tolist()
        ids = processed["input_ids"][row][kept].tolist()
        places = (
            _as_one(processor, texts[row], ids, ends, special)
            if replaced is None
            else replaced[row]
        )
        moved = _as_given(ends, places)
        if replaced is not None:
            moved = _without_prefix(processor, texts[row], ids, moved, special, examples[row].where)
        tokens.append(Tokens(ids, moved))
    processed = {name: value for name, value in processed.items() if isinstance(value, Tensor)}
    return processed, tokens


def _as_one(
    processor: Any, text: str, ids: list[int], ends: list[int], special: bool
) -> list[Mapping[str, Any]]:
    """All text up to the last image as one place, for a processor that does not say what it put there.

    What comes behind is as far from the end as it was. Where an image stays one token (Mllama), or there is
    none, what was put in stands before all text.
    """
    token = str(getattr(processor, "image_token", None) or "<image>")
    shift = max(ends, default=0) - tokens_of(processor.tokenizer, text, special, "A row").end
    alone = ids.count(processor.tokenizer.convert_tokens_to_ids(token)) == text.count(token)
    last = 0 if alone else text.rfind(token) + len(token)
    return [{"span": (0, last), "new_span": (0, last + shift)}] if shift else []


def _without_prefix(
    processor: Any, text: str, ids: list[int], ends: list[int], special: bool, where: str
) -> list[int]:
    """Ends as characters of the text that was given, where the processor put some before it (Emu3, Molmo2).

    Raises:
        DataError: it put text somewhere else.
    """
    alone = tokens_of(processor.tokenizer, text, special, where)
    put = max(ends, default=0) - alone.end
    if not put:
        return ends
    if put < 0 or ids[-CLOSING:] != list(alone.ids[-CLOSING:]):
        raise DataError(
            f"{where}: this model's processor writes something of its own into a chat, so that its answers "
            f"cannot be found among the tokens; take a model whose processor only opens images out."
        )
    return [max(0, end - put) for end in ends]


CLOSING = 3
"""Tokens that a chat must end with as it does without images."""


def _as_given(ends: list[int], replaced: Sequence[Mapping[str, Any]]) -> list[int]:
    """Characters of the text with images opened out, as characters of the text that was given."""
    moved: list[int] = []
    for end in ends:
        shift = 0
        for place in replaced:
            (_, old), (new_start, new) = place["span"], place["new_span"]
            if end >= new:
                shift = new - old
            elif end > new_start:  # within the image's own tokens
                end, shift = old, 0
                break
        moved.append(end - shift)
    return moved
