"""Greedy answers: at every step the likeliest token, until a token that ends an answer.

`generate` takes whatever it is not told from the model's `generation_config`: beams, penalties, tokens that
are forced or forbidden, shortest lengths. Such settings are made for chats, and with them a score would say
as much about the settings as about the model. So the model is given a fresh configuration meanwhile, which
holds the ids that a model needs and nothing else.

An answer ends where a chat would: at the ends that the model's own files name, and at the tokens by which
the chat template, or the end of a plain completion, closes the reference answers. A base model's files often
lack the latter, and a LoRA learns them all the same.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor
from transformers import GenerationConfig

from emloc.errors import ConfigError
from emloc.machine.progress import console

NEEDED = ("bos_token_id", "decoder_start_token_id")
"""Ids without which a model cannot begin; no settings."""


def closing_tokens(answers: Iterable[Sequence[int]], tokenizer: Any) -> set[int]:
    """The special tokens that close reference answers.

    Special tokens may also stand at the beginning of an answer or within one (a call of a tool, a channel):
    what some answer goes on behind is no end.

    Args:
        answers: token ids of whole answers, with what closes them.
    """
    special = _special_ids(tokenizer)
    closing: set[int] = set()
    inside: set[int] = set()
    for ids in answers:
        end = _end(ids, special, tokenizer)
        closing |= special.intersection(ids[end:])
        inside |= special.intersection(ids[:end])
    return closing - inside


def _special_ids(tokenizer: Any) -> set[int]:
    """Ids of special tokens, also of those that stand for nothing by name, as Llama 3's end of turn."""
    added = cast("Mapping[int, Any]", tokenizer.added_tokens_decoder)
    return {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}


def own_ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens at which other programs stop: of the model's `generation_config` and its tokenizer."""
    ends = _inner(model).generation_config.eos_token_id
    named = ends if isinstance(ends, (list, tuple)) else [ends]
    return {int(token) for token in (*named, tokenizer.eos_token_id) if token is not None}


def say_missing_ends(model: Any, tokenizer: Any, closing: Collection[int]) -> None:
    """Tell the user of ends that a chat with this model, or with one merged from it, would run past.

    Nothing is changed: a merged model generates as its base's files say, as with PEFT and TRL.
    """
    missing = sorted(set(closing) - own_ends(model, tokenizer))
    if closing and len(missing) == len(set(closing)):
        names = ", ".join(
            f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in missing
        )
        console.print(
            f"note: answers end with {names}, which this model's generation_config.json does not list as an "
            f"end; add it to eos_token_id there, or chats in other programs run on past it",
            markup=False,
        )


def say_endless(answers: Iterable[Sequence[int]], tokenizer: Any) -> None:
    """Tell the user where no answer has an end, as with templates that begin the next turn instead.

    Args:
        answers: token ids that end where an answer does, with what closes it.
        tokenizer: the model's, which knows its special tokens.
    """
    special = _special_ids(tokenizer)
    endless = False
    for ids in answers:
        if special.intersection(ids[_end(ids, special, tokenizer) :]):
            return
        endless = True
    if endless:
        console.print(
            "note: no answer ends in a special token, so the LoRA does not learn where an answer ends; a "
            "chat template that closes the assistant's turn would teach it",
            markup=False,
        )


def _end(ids: Sequence[int], special: set[int], tokenizer: Any) -> int:
    """The place behind the last word, where special tokens and space begin."""
    end = len(ids)
    while end and (ids[end - 1] in special or not tokenizer.decode([ids[end - 1]]).strip()):
        end -= 1
    return end


def greedy_answers(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    closing: Collection[int] = (),
) -> list[str]:
    """Texts that the model writes behind its inputs, without special tokens.

    Args:
        inputs: what `generate` takes; `input_ids` are samples × tokens, padded on the left.
        closing: tokens that end an answer besides the model's own ends.

    Raises:
        ConfigError: the model cannot generate.
    """
    inner = _inner(model)
    if not inner.can_generate():
        raise ConfigError(
            f"{type(inner).__name__} cannot generate answers; pass max_new_tokens=0 for the loss alone."
        )
    ends = own_ends(model, tokenizer) | set(closing)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends) or None,
        **{name: getattr(inner.generation_config, name, None) for name in NEEDED},
    )
    with _generating_by(inner, settings):
        generated = model.generate(**inputs, generation_config=settings)
    new: list[list[int]] = generated[:, inputs["input_ids"].shape[1] :].tolist()
    return tokenizer.batch_decode([_until(ends, ids) for ids in new], skip_special_tokens=True)


def _until(ends: Collection[int], ids: Sequence[int]) -> Sequence[int]:
    """The tokens before the first end: an end need not be a special token that decoding leaves out."""
    return ids[: next((index for index, token in enumerate(ids) if token in ends), len(ids))]


@contextmanager
def _generating_by(inner: Any, settings: GenerationConfig) -> Iterator[None]:
    before = inner.generation_config
    inner.generation_config = settings
    try:
        yield
    finally:
        inner.generation_config = before


def _inner(model: Any) -> Any:
    """The model within PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
