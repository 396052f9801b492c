"""From chats with images to what a model's forward takes, the same for all stages.

The processor renders the prompt, opens out the images' places and makes the tensors; the answer is
tokenised by itself and put behind, so that generation continues exactly what training saw. Images are
opened when a micro-batch is made, not before.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from emloc.config import DataOptions
from emloc.errors import DataError
from emloc.integrations.transformers.chat import cut_chat
from emloc.integrations.transformers.generation import closing_tokens
from emloc.integrations.transformers.loss import IGNORED
from emloc.progress import console
from emloc_vlm.examples import Example


def collate(
    examples: Sequence[Example],
    processor: Any,
    options: DataOptions,
    answers: bool = True,
) -> dict[str, Tensor]:
    """One micro-batch: `input_ids`, `attention_mask`, `labels` (samples × longest, int64), and images.

    Args:
        answers: with the answers, padded on the right; without, for generation, padded on the left.

    Raises:
        DataError: a sample is longer than `max_length` before its answer ends in it, or its image
            cannot be read.
    """
    every = options.assistant_only_loss
    chats = [_pieces(example, processor, every) for example in examples]
    prompts = ["".join(text for text, _ in pieces[:-1]) for pieces in chats]
    images = [[image.open() for image in example.images] for example in examples]
    inputs = dict(_processed(processor, prompts, images))
    mask = inputs["attention_mask"].bool()
    heads = [row[kept].tolist() for row, kept in zip(inputs["input_ids"], mask)]
    tails = [_tokens(processor, pieces[-1][0]) if answers else [] for pieces in chats]
    rows: list[tuple[list[int], list[int]]] = []
    for example, head, tail, pieces in zip(examples, heads, tails, chats):
        labels = [IGNORED] * len(head) + tail
        if not (options.completion_only_loss or every):
            labels = [*head, *tail]
        elif every and answers:
            _label_answers(
                labels, head, [_tokens(processor, t) for t, a in pieces[:-1] if a], example
            )
        if len(head) >= options.max_length:
            raise DataError(
                f"{example.where}: its prompt and images take {len(head)} tokens, which leaves nothing "
                f"of max_length={options.max_length} for the answer; raise max_length or lower "
                f"max_dynamic_patch."
            )
        if len(head) + len(tail) > options.max_length:
            _say_cut(options.max_length, example.where)
        rows.append(((head + tail)[: options.max_length], labels[: options.max_length]))
    pad = processor.tokenizer.pad_token_id
    longest = max(len(ids) for ids, _ in rows)

    def fill(values: list[int], filler: int) -> list[int]:
        blank = [filler] * (longest - len(values))
        return values + blank if answers else blank + values

    batch = {
        "input_ids": torch.tensor([fill(ids, pad) for ids, _ in rows]),
        "attention_mask": torch.tensor([fill([1] * len(ids), 0) for ids, _ in rows]),
        "labels": torch.tensor([fill(labels, IGNORED) for _, labels in rows]),
    }
    for name, tensor in inputs.items():
        if name in batch or not isinstance(tensor, Tensor):
            continue
        if tensor.shape == mask.shape:  # of the text as well, such as which tokens are images
            parts = [row[kept].tolist() for row, kept in zip(tensor, mask)]
            tensor = torch.tensor(
                [
                    fill((part + [0] * len(tail))[: options.max_length], 0)
                    for part, tail in zip(parts, tails)
                ]
            )
        batch[name] = tensor
    return batch


def end_tokens(examples: Sequence[Example], processor: Any, options: DataOptions) -> set[int]:
    """The special tokens that close the answers of these chats: where generation stops, besides the
    model's own end of text (checkpoints of OpenGVLab name only that one)."""
    every = options.assistant_only_loss
    tails = (_tokens(processor, _pieces(example, processor, every)[-1][0]) for example in examples)
    return closing_tokens(tails, processor.tokenizer)


@cache
def _say_cut(max_length: int, where: str) -> None:
    """Once per sample."""
    console.print(f"[yellow]warning:[/] {where}: its answer is cut at max_length={max_length}")


def _pieces(example: Example, processor: Any, every: bool) -> list[tuple[str, bool]]:
    if getattr(processor, "chat_template", None) is None:
        raise DataError("The model's processor has no chat template; use an instruct model.")

    def render(count: int, **more: Any) -> str:
        messages = list(example.messages[:count])
        return str(processor.apply_chat_template(messages, tokenize=False, **more))

    return cut_chat(example.messages, render, every)


def _processed(processor: Any, prompts: list[str], images: list[list[Any]]) -> Any:
    bos = processor.tokenizer.bos_token
    # A template that writes the beginning of the sequence itself must not get a second one.
    special = {"add_special_tokens": False} if bos and prompts[0].startswith(bos) else {}
    given = {"images": images} if any(images) else {}
    try:
        return processor(
            text=prompts,
            **given,
            padding=True,
            padding_side="right",
            return_tensors="pt",
            **special,
        )
    except (ValueError, IndexError) as problem:
        raise DataError(
            f"The processor cannot encode a sample: {str(problem).strip().splitlines()[0]}"
        ) from problem


def _tokens(processor: Any, text: str) -> list[int]:
    return list(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def _label_answers(
    labels: list[int], head: list[int], answers: list[list[int]], example: Example
) -> None:
    """Label the earlier answers of a chat where they stand in the prompt."""
    start = 0
    for answer in answers:
        while head[start : start + len(answer)] != answer:
            start += 1
            if start + len(answer) > len(head):
                raise DataError(
                    f"{example.where}: an earlier answer is tokenised differently inside the chat; leave "
                    f"assistant_only_loss out."
                )
        labels[start : start + len(answer)] = answer
        start += len(answer)
