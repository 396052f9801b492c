"""A table of embeddings that stays in its file, as it is stored, and gives rows that are computed with."""

from typing import Any

import torch
from torch import Tensor, nn


def read_rows(module: nn.Embedding, device: torch.device, dtype: torch.dtype) -> None:
    """Have a table on the CPU give its rows on the device of computation and in its dtype.

    A table that multiplies its rows by a scale (`embed_scale`, as Gemma's and BART's do) does so in the
    dtype of its weight; it gets those that are asked for in the dtype of computation first. A copy that is
    trained has its hooks from here and is in memory: they let it be.
    """
    stored: list[tuple[Any, int | None]] = []

    # Embeddings of positions may take lengths or shapes, by position or by name.
    def on_cpu(value: Any) -> Any:
        return value.cpu() if isinstance(value, Tensor) else value

    def to_file(
        table: nn.Embedding, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if table.weight.requires_grad:
            return None
        inputs, named = tuple(map(on_cpu, inputs)), {key: on_cpu(v) for key, v in named.items()}
        ids = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor)]
        weight = table.weight
        if weight.dtype == dtype or not hasattr(table, "embed_scale") or len(ids) != 1:
            return inputs, named
        [asked] = ids
        rows, places = asked.unique(return_inverse=True)
        stored.append((weight, table.padding_idx))
        table.weight = nn.Parameter(weight[rows].to(dtype), requires_grad=False)
        table.padding_idx = None  # it is for gradients, and has to be among the rows

        def in_rows(value: Any) -> Any:
            return places if value is asked else value

        return tuple(map(in_rows, inputs)), {key: in_rows(v) for key, v in named.items()}

    def to_compute(table: nn.Embedding, __: object, output: Any) -> Any:
        if table.weight.requires_grad:
            return output
        if stored:
            table.weight, table.padding_idx = stored.pop()
        return output.to(device, dtype) if isinstance(output, Tensor) else output

    module.register_forward_pre_hook(to_file, with_kwargs=True)
    module.register_forward_hook(to_compute)
