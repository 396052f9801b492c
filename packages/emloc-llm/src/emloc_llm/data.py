"""The way from rows of data sets to token ids and labels, the same for calibration, training and scoring.

Chats go through the tokenizer's chat template. A plain prompt and completion are concatenated and ended by
the end-of-sequence token, as TRL does. Either is tokenised as a whole. Labels are -100 where there is no
loss: on prompts, unless asked otherwise.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from emloc.errors import DataError
from emloc.integrations.transformers.chat import render
from emloc.integrations.transformers.data.columns import form_of
from emloc.integrations.transformers.data.rows import RowStream, where_of
from emloc.integrations.transformers.data.texts import answer_of, text_of
from emloc.integrations.transformers.data.turns import alpaca_question, chat_of
from emloc.integrations.transformers.loss import IGNORED
from emloc.integrations.transformers.tables import dataset_names, mix, shares
from emloc.integrations.transformers.tokens import as_generated, token_ids, tokens_of
from emloc.machine.progress import console
from emloc_llm.rows import load_rows


@dataclass(frozen=True)
class Sample:
    """One encoded example.

    Attributes:
        input_ids: prompt and completion.
        labels: same length, -100 where there is no loss.
        prompt_length: tokens before the completion; 0 for plain text.
        reference: the completion as text; None for plain text.
        written: the completion as the chat template writes it; empty where there is none.
        truncated: whether max_length cut it.
        prompt: what a model is given to answer: the prompt's tokens by themselves, not cut. They are the
            first of `input_ids`, save where a word reaches over the prompt's end.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    reference: str | None
    truncated: bool
    prompt: list[int] = field(default_factory=list[int])
    written: str = ""


def encode(row: Mapping[str, Any], tokenizer: Any, options: Any) -> Sample:
    """Token ids and labels of one row.

    Raises:
        DataError: the row is malformed, or the chat template refuses it.
    """
    where = where_of(row)
    has_template = getattr(tokenizer, "chat_template", None) is not None
    form = form_of(row)
    chat = chat_of(row, where) if has_template or form != "alpaca" else None
    if chat is None:
        return _plain(row, form, tokenizer, options, where)
    rendered = render(
        chat, tokenizer, options.assistant_only_loss, where, options.completion_only_loss
    )
    tokens = tokens_of(tokenizer, rendered.text, False, where)
    last, said = chat.turns[-1], rendered.text[rendered.last :]
    # A call is compared as the template writes it, which is how the model says it.
    called = bool(last.get("tool_calls"))
    sample = _sample(
        tokens.ids,
        tokens.labels(rendered.answers, IGNORED),
        tokens.upto(rendered.last),
        as_generated(tokenizer, said, where) if called else str(last.get("content") or ""),
        token_ids(tokenizer, rendered.prompt, False, where),
        options,
    )
    return replace(sample, written=said)


def _sample(
    ids: list[int],
    labels: list[int],
    prompt_length: int,
    reference: str | None,
    prompt: list[int],
    options: Any,
) -> Sample:
    everywhere = not (options.completion_only_loss or options.assistant_only_loss)
    labels = ids if everywhere else labels
    sample = Sample(ids, labels, prompt_length, reference, False, prompt)
    return sample if _is_packed(options) else cut(sample, options.max_length)


def _is_packed(options: Any) -> bool:
    """Return whether samples are joined and cut anywhere, so that nothing of a long one is lost."""
    return bool(getattr(options, "packing", False))


def cut(sample: Sample, limit: int) -> Sample:
    """The beginning of a sample that is longer than `limit` tokens; any other as it is."""
    ids, labels = sample.input_ids[:limit], sample.labels[:limit]
    if len(ids) == len(sample.input_ids):
        return sample
    return replace(sample, input_ids=ids, labels=labels, truncated=True)


def seen(sample: Sample, options: Any) -> Iterator[list[int]]:
    """The tokens of a sample in the pieces that a model may see at once."""
    for start in range(0, len(sample.input_ids), options.max_length):
        yield sample.input_ids[start : start + options.max_length]


def learnable(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with a label; one whose completion was cut off would add padding and no loss."""
    return [sample for sample in samples if any(label != IGNORED for label in sample.labels)]


def _plain(
    row: Mapping[str, Any], form: str | None, tokenizer: Any, options: Any, where: str
) -> Sample:
    """A sample without turns."""
    if form == "text":
        text = text_of(row["text"], "text", where)
        ids = _ended(_begun(token_ids(tokenizer, text, True, where), tokenizer), tokenizer)
        return _sample(ids, ids, 0, None, [], options)
    if form == "alpaca":  # for a model without chats
        prompt, completion = alpaca_question(row, where) + "\n\n", row["output"]
    elif form == "prompt":
        prompt, completion = text_of(row["prompt"], "prompt", where), row["completion"]
    else:
        raise DataError(
            f"{where} has neither messages, nor prompt and completion, nor text: its columns are "
            f"{', '.join(map(str, row))}."
        )
    for column in ("system", "history", "tools"):
        if row.get(column):
            raise DataError(
                f"{where}: the column {column} has no place in a prompt that is plain text; write it into "
                f"the prompt, or use messages and a model with a chat template."
            )
    reference = answer_of(completion, "completion" if form == "prompt" else "output", where)
    tokens = tokens_of(tokenizer, prompt + reference, True, where)
    ids = _begun(tokens.ids, tokenizer)
    length = max(0, tokens.upto(len(prompt)) - (len(tokens.ids) - len(ids)))
    ids = _ended(ids, tokenizer)
    asked = _begun(token_ids(tokenizer, prompt, True, where), tokenizer)
    end = tokenizer.eos_token_id
    if asked[-1:] == [end] and not prompt.endswith(tokenizer.eos_token):
        asked.pop()  # of a tokenizer that ends whatever it is given
    return _sample(ids, [IGNORED] * length + ids[length:], length, reference, asked, options)


def _begun(ids: list[int], tokenizer: Any) -> list[int]:
    """Begun once, where a text begins with the token that the tokenizer puts before it."""
    begin = tokenizer.bos_token_id
    return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """Ended once, whether by the text, by the tokenizer, or by neither."""
    end = tokenizer.eos_token_id
    if end is None:
        return ids
    while ids[-1:] == [end]:
        ids = ids[:-1]
    return [*ids, end]


def encode_all(rows: Any, tokenizer: Any, options: Any, name: str) -> list[Sample]:
    """Encode all rows.

    Raises:
        DataError: in no row is there anything to learn from.
    """
    samples = [encode(row, tokenizer, options) for row in rows]
    require_labels(samples, options, name)
    return samples


def require_labels(samples: Sequence[Sample], options: Any, name: str) -> None:
    """Refuse a data set that teaches nothing.

    Raises:
        DataError: none of its samples has a label.
    """
    if all(label == IGNORED for sample in samples for label in sample.labels):
        raise DataError(
            f"Data set {name}: every label is masked, so there is nothing to learn from; prompts fill "
            f"max_length={options.max_length}, or completions are empty. Raise max_length."
        )


def load_samples(options: Any, tokenizer: Any, seed: int) -> list[Sample]:
    """All samples of all data sets; by weights, where given, the smaller sets repeated as needed."""
    names = dataset_names(options) or [""]
    parts = [encode_all(load_rows(options, name), tokenizer, options, name) for name in names]
    for name, part in zip(names, parts):
        say_truncated(part, options, f"samples of {name}")
        say_unlearnable(part, f"samples of {name}")
        say_merged(part, f"samples of {name}")
    if len(parts) == 1:
        return parts[0]
    wanted = shares(options, [len(part) for part in parts])
    mixed = mix(parts, wanted, seed)
    counts = ", ".join(f"{round(len(mixed) * s)} of {n}" for s, n in zip(wanted, names))
    console.print(f"{len(mixed)} samples: {counts}")
    return mixed


def draw_samples(options: Any, tokenizer: Any) -> list[Sample]:
    """Calibration samples, drawn by seed from each data set according to its share.

    As many as `num_calibration_samples`, or until there are `num_calibration_tokens`.
    """
    names = dataset_names(options) or [""]
    tables = [load_rows(options, name).shuffled(options.seed) for name in names]
    sizes = [1 if isinstance(table, RowStream) else len(table) for table in tables]
    drawn: list[Sample] = []
    for name, table, share in zip(names, tables, shares(options, sizes)):
        part = _draw(table, tokenizer, options, share)
        require_labels(part, options, name)
        say_truncated(part, options, f"calibration samples of {name}")
        drawn += part
    return [sample for sample in drawn if sample.input_ids]


def _draw(table: Any, tokenizer: Any, options: Any, share: float) -> list[Sample]:
    rows = round(options.num_calibration_samples * share)
    tokens = options.num_calibration_tokens
    part: list[Sample] = []
    count = 0
    for row in table:
        if (len(part) >= max(rows, 1)) if tokens is None else (count >= tokens * share):
            break
        part.append(encode(row, tokenizer, options))
        count += len(part[-1].input_ids)
    return part


def say_truncated(samples: Sequence[Sample], options: Any, what: str) -> None:
    """Tell the user how many samples max_length cut."""
    cut = sum(sample.truncated for sample in samples)
    if cut:
        console.print(
            f"{cut} of {len(samples)} {what} are longer than max_length={options.max_length} and "
            f"were truncated"
        )


def say_unlearnable(samples: Sequence[Sample], what: str) -> None:
    """Tell the user how many samples have no label, and so are left out of training."""
    none = len(samples) - len(learnable(samples))
    if none:
        console.print(
            f"{none} of {len(samples)} {what} have no label to learn from, and training leaves them out"
        )


def say_merged(samples: Sequence[Sample], what: str) -> None:
    """Tell the user in how many samples a word reaches over the end of the prompt."""
    merged = sum(
        sample.prompt[: len(sample.input_ids)] != sample.input_ids[: len(sample.prompt)]
        for sample in samples
    )
    if merged:
        console.print(
            f"in {merged} of {len(samples)} {what} the last word of the prompt and the first of the answer "
            f"share one token; asked for the answer alone, the model sees other tokens (end prompts without "
            f"a space, and begin answers with it)"
        )


def pad(samples: Sequence[Sample], pad_id: int, left: bool = False) -> dict[str, Tensor]:
    """A batch: `input_ids`, `attention_mask`, `labels`, each samples × longest, int64."""
    longest = max(len(sample.input_ids) for sample in samples)

    def fill(values: list[int], filler: int) -> list[int]:
        blank = [filler] * (longest - len(values))
        return blank + values if left else values + blank

    return {
        "input_ids": torch.tensor([fill(s.input_ids, pad_id) for s in samples]),
        "attention_mask": torch.tensor([fill([1] * len(s.input_ids), 0) for s in samples]),
        "labels": torch.tensor([fill(s.labels, IGNORED) for s in samples]),
    }
