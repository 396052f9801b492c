"""Limits on the tokens and positions that a model has rows for, so that data that does not fit is refused.

A tokenizer may have more tokens than its model (added ones, of which nobody told the model), and a model with
learned positions has no row for the next one. Both would end in an index error, an hour later or on a GPU.
Rotary positions have no end; there, longer samples are the user's choice.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import CheckpointError, DataError
from emloc.integrations.transformers.skeleton import empty_model

_POSITIONS = re.compile(
    r"wpe|position_embeddings?|pos_emb\w*|embed_positions?|positions_embed|positional_embedding"
)

_OTHER_SENSES = re.compile(r"vision|visual|image|video|audio|speech|perceiver|qformer")
"""Modules whose positions are those of patches and frames, where they lie inside what decodes text."""


@dataclass(frozen=True)
class Capacity:
    """The tokens and positions that a model has rows for.

    Attributes:
        tokens: ids from 0 to below this; None where it is not known.
        positions: tokens of one sample; None where there is no end.
    """

    tokens: int | None
    positions: int | None

    def check(
        self, samples: Iterable[Sequence[int]], tokenizer: Any, what: str, more: int = 0
    ) -> None:
        """Refuse samples that the model has no rows for.

        Args:
            samples: token ids.
            what: the samples, for messages.
            more: tokens that will be written behind each of them.

        Raises:
            CheckpointError: the tokenizer gives a token that the model has no row for.
            DataError: a sample has more tokens than the model has positions.
        """
        largest, longest = int(tokenizer.pad_token_id or 0), 0
        for ids in samples:
            largest, longest = max(largest, max(ids, default=0)), max(longest, len(ids))
        self.check_token(largest, tokenizer)
        if self.positions is not None and longest + more > self.positions:
            behind = f" and {more} more to write" if more else ""
            raise DataError(
                f"{what}: one has {longest} tokens{behind}, but the model has {self.positions} positions; "
                f"{_advice(self.positions, longest, more)}."
            )

    def check_packed(self, max_length: int) -> None:
        """Refuse rows of several samples that are longer than the model.

        Raises:
            DataError: says how long they may be.
        """
        if self.positions is not None and max_length > self.positions:
            raise DataError(
                f"packing fills max_length={max_length}, but the model has {self.positions} positions; pass "
                f"max_length={self.positions}, or less."
            )

    def check_token(self, token: int, tokenizer: Any) -> None:
        """Refuse a token that the model has no row for.

        Raises:
            CheckpointError: names it.
        """
        if self.tokens is not None and token >= self.tokens:
            raise CheckpointError(
                f"The tokenizer gives {tokenizer.convert_ids_to_tokens(token)!r} the id {token}, but the "
                f"model has rows for {self.tokens} tokens; resize its embeddings (resize_token_embeddings) "
                f"and save it, or take the added token out of the tokenizer."
            )


def _advice(positions: int, longest: int, more: int) -> str:
    if more and longest < positions:
        return f"pass max_new_tokens={positions - longest}, or less"
    return f"pass max_length={positions}, or less"


def load_capacity(path: Path, auto_class: Any) -> Capacity:
    """`capacity_of` a model's folder, from its config alone.

    Raises:
        CheckpointError: transformers does not know the architecture.
    """
    return capacity_of(empty_model(Checkpoint.open(path), auto_class, torch.float32))


def capacity_of(model: Any, read: bool = False) -> Capacity:
    """Read the capacity off a model's modules, which may be on the meta device.

    Args:
        read: what an encoder reads, where a decoder behind it writes.
    """
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    part = "get_encoder" if read else "get_decoder"
    stack = getattr(model, part)() if hasattr(model, part) else model
    positions = [
        count
        for name, module in (stack or model).named_modules()
        if not _OTHER_SENSES.search(name)
        for count in _limits(name.rpartition(".")[2], module)
    ]
    return Capacity(rows if isinstance(rows, int) else None, min(positions, default=None))


def _limits(name: str, module: Any) -> Iterator[int]:
    if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name):
        # OPT's rows begin behind an offset, RoBERTa's behind that of padding.
        behind = module.padding_idx
        before = getattr(module, "offset", 0 if behind is None else behind + 1)
        yield int(module.num_embeddings) - int(before)
    for table in ("embed_positions", "pos_encoding"):  # sines in a table: GPT-J, CodeGen, CTRL
        fixed = getattr(module, table, None)
        if isinstance(fixed, Tensor):
            yield int(fixed.shape[0])
    if hasattr(module, "build_mpt_alibi_tensor"):
        config: Any = module.config
        yield int(config.max_seq_len)
