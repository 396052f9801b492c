"""Input embeddings and output head in few bits: a table of rows that are looked up, and multiplied.

A lookup decodes the rows that it looks up; where a library multiplies tiles of the head, one tile is made
at a time (`ReadOnlyWeight`). The head itself makes `ROWS` rows at a time in the forward and once more in the
backward: the dense table, a large part of a model with a large vocabulary, is never there. A tied head
holds nothing and reads the tensors of the embeddings.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from emloc.layers.coded_weight import CodedWeight
from emloc.layers.quantized_layers import Decode, QuantizedLinear, Stored, StoredWeight
from emloc.layers.read_only_weight import ReadOnlyWeight

ROWS = 8192
"""Rows of a head that are dense at a time."""


class Table(StoredWeight):
    """A weight that is read row by row."""

    def coded(self, *stored: Tensor) -> CodedWeight:
        """The weight of its stored tensors."""
        return cast(CodedWeight, self._operator(*stored))

    def _row_by_row(self) -> ReadOnlyWeight:
        stored, dtype = [tensor.detach() for tensor in self._stored()], self.made_in
        coded = self.coded(*stored)
        shape, device = (coded.packed.shape[0], coded.columns), coded.packed.device

        def rows(index: Tensor) -> Tensor:
            return coded.rows(index, dtype)

        return ReadOnlyWeight(lambda: coded.dense(dtype), shape, dtype, device, rows)


class CodedEmbedding(Table, nn.Embedding):
    """`nn.Embedding` whose rows are decoded when they are looked up; made by `coded_embedding`."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The table, rows × d, decoded where its values are used; read-only."""
        return self._row_by_row()

    def forward(self, input: Tensor) -> Tensor:
        """Rows by their numbers, (...) to (..., d)."""
        coded = self.coded(*self._stored())
        return coded.rows(input.reshape(-1), self.made_in).view(*input.shape, coded.columns)


def coded_embedding(
    dense: nn.Embedding, stored: Stored, decode: Decode, shown: str
) -> CodedEmbedding:
    """An empty embedding in the place of `dense`, which computes what that does with its rows.

    Args:
        dense: of any subclass whose forward looks rows up as `nn.Embedding` does, and perhaps scales them.
    """
    kind: type[CodedEmbedding] = CodedEmbedding
    own_kind: Any = type(dense)
    if own_kind is not nn.Embedding:  # its forward comes first, and asks ours for the rows
        kind = type(f"Coded{own_kind.__name__}", (own_kind, CodedEmbedding), {})
    made = kind.__new__(kind)
    nn.Module.__init__(made)  # nn.Embedding's own would allocate the dense table
    own = vars(made)
    made.__dict__.update({name: value for name, value in vars(dense).items() if name not in own})
    for name, buffer in dense.named_buffers(recurse=False):
        persistent = name in dense.state_dict()
        made.register_buffer(name, buffer, persistent=persistent)
    made.hold(stored, decode, shown, (dense.weight.dtype, dense.weight.device))
    return made


class CodedHead(Table, QuantizedLinear):
    """`y = x @ Wᵀ + bias` for a table of outputs, some of which are decoded at a time."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The table, d_out × d_in, decoded where its values are used; read-only."""
        return self._row_by_row()

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out)."""
        return cast(Tensor, _ByRows.apply(input, self.coded, self.bias, *self._stored()))


class TiedHead(CodedHead):
    """A head that reads the tensors of the embeddings.

    Args:
        dense: the head whose place it takes.
        embeddings: hold the table.
    """

    def __init__(self, dense: nn.Linear, embeddings: CodedEmbedding) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        # In a tuple, so that the table is not a part of the head as well.
        self._table = (embeddings,)
        self._shown = "tied"
        self.bias = dense.bias

    @property
    def made_in(self) -> torch.dtype:  # type: ignore[override]
        """The dtype that the embeddings are decoded in."""
        return self._table[0].made_in

    def _stored(self) -> list[Tensor]:
        return self._table[0]._stored()  # pyright: ignore[reportPrivateUsage]

    def _operator(self, *stored: Tensor) -> Any:
        return self._table[0]._operator(*stored)  # pyright: ignore[reportPrivateUsage]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return nn.Module._apply(self, fn, recurse)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, coded: Any, bias: Tensor | None, *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.coded, ctx.dtype = coded, x.dtype
        weight: CodedWeight = coded(*stored)
        made: Tensor | None = None
        for inside, part in _parts(weight, x.dtype):
            y = nn.functional.linear(x, part, None if bias is None else bias[inside])
            if made is None:  # autocast has the say in its dtype
                made = y.new_empty(*y.shape[:-1], weight.packed.shape[0])
            made[..., inside] = y
        assert made is not None
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        stored, of_x = ctx.saved_tensors, None
        if ctx.needs_input_grad[0]:
            for inside, part in _parts(ctx.coded(*stored), gradients[0].dtype):
                y = gradients[0][..., inside] @ part
                # Sums of sixteen bits would lose what a part adds.
                high = torch.promote_types(y.dtype, torch.float32)
                of_x = y.to(high) if of_x is None else of_x.add_(y)
            assert of_x is not None
            of_x = of_x.to(ctx.dtype)
        return of_x, None, None, *(None for _ in stored)


def _parts(weight: CodedWeight, dtype: torch.dtype) -> Any:
    """Slices of rows, and those rows."""
    rows = weight.packed.shape[0]
    for start in range(0, rows, ROWS):
        stop = min(start + ROWS, rows)
        index = torch.arange(start, stop, device=weight.packed.device)
        yield slice(start, stop), weight.rows(index, dtype)
