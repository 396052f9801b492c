"""A linear layer whose weight is `left @ right`, as an `nn.Linear` that PEFT and transformers know.

Layers of one input share `right`; the projection `x @ rightᵀ` is computed once and handed to the
others while they are called with the same tensor.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from emloc.layers.emulated_layer import EmulatedLayer
from emloc.layers.low_rank_products import Expand, Project
from emloc.layers.read_only_weight import ReadOnlyWeight


class SharedProjection:
    """The right factor of a group, held by its first layer, and its product with the last input.

    Not a module: every layer of the group refers to it, and only the owner holds the parameter.
    The product is kept until all layers of the group have taken it, so it does not outlive the
    group's forward; a different input tensor replaces it.
    """

    def __init__(self, owner: "LowRankLinear", size: int) -> None:
        self.owner = owner
        self.size = size
        self._loras: list[Any] = []
        self._input: Tensor | None = None
        self._version = 0
        self._in_graph = False
        self._product: Tensor | None = None
        self._lora_products: dict[int, Tensor] = {}
        self._taken: set[int] = set()

    def attach(self, lora: Any) -> None:
        """Take a `FusedLora` on a layer of the group; another on the same layer is let go."""
        others = [other for other in self._loras if other.base_layer is not lora.base_layer]
        self._loras = [*others, lora]

    def project(self, x: Tensor, layer: "LowRankLinear") -> Tensor:
        """`x @ rightᵀ`, (..., d_in) to (..., rank), for `layer` of the group."""
        if self.size == 1:
            return nn.functional.linear(x, self.owner.right)
        if self._is_stale(x, layer):
            self._restart(x)
            self._product = nn.functional.linear(x, self.owner.right)
        return self._take(layer)

    def project_with_lora(self, x: Tensor, layer: "LowRankLinear") -> tuple[Tensor, Tensor]:
        """`x @ rightᵀ` and `x @ Aᵀ`, (..., r), of the LoRA on `layer`, with those of the group at once."""
        if self._is_stale(x, layer) or id(layer) not in self._lora_products:
            self._restart(x)
            plain = [(lora, lora.plain_down(x)) for lora in self._loras]
            downs = {id(lora.base_layer): down for lora, down in plain if down is not None}
            x, right, *parts = _as_autocast(x, self.owner.right, *downs.values())
            self._product, *products = cast(Any, Project.apply(x, right, *parts))
            self._lora_products = dict(zip(downs, products))
        z = self._lora_products.pop(id(layer))
        return self._take(layer), z

    def _is_stale(self, x: Tensor, layer: "LowRankLinear") -> bool:
        return (
            self._input is not x
            or self._version != _version(x)
            or self._product is None
            or id(layer) in self._taken  # the same layer again: another forward
            # A product made without a graph must not serve a forward that needs one.
            or self._in_graph != torch.is_grad_enabled()
        )

    def _restart(self, x: Tensor) -> None:
        self._input, self._version, self._taken = x, _version(x), set()
        self._in_graph, self._lora_products = torch.is_grad_enabled(), {}

    def _take(self, layer: "LowRankLinear") -> Tensor:
        product = self._product
        assert product is not None
        self._taken.add(id(layer))
        if len(self._taken) == self.size:
            self._input = self._product = None
        return product


def _version(x: Tensor) -> int:
    # Inference tensors count no versions; nothing can go back through them either.
    return -1 if x.is_inference() else x._version


def _as_autocast(x: Tensor, *others: Tensor) -> list[Tensor]:
    """Cast to the dtype in which autocast would multiply; without autocast, leave as it is."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return [x, *others]
    dtype = torch.get_autocast_dtype(device)
    return [tensor.to(dtype) for tensor in (x, *others)]


class LowRankLinear(EmulatedLayer, nn.Linear):
    """`y = (x @ rightᵀ) @ leftᵀ + bias`.

    Args:
        d_in, d_out, rank: sizes; `left` is d_out × rank, `right` rank × d_in.
        shared: the group's projection; None makes this layer the first of its group.
        group_size: layers in the group, where this is the first.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        bias: bool,
        dtype: torch.dtype,
        device: Any = None,
        shared: SharedProjection | None = None,
        group_size: int = 1,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.in_features, self.out_features, self.rank = d_in, d_out, rank

        def empty(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*size, dtype=dtype, device=device), requires_grad=False)

        self.left = empty(d_out, rank)
        if shared is None:
            self.right = empty(rank, d_in)
            shared = SharedProjection(self, group_size)
        self.bias = empty(d_out) if bias else None
        self.shared = shared

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The product of the factors, d_out × d_in, computed anew where it is used; read-only."""
        with torch.no_grad():
            return ReadOnlyWeight.of_product(self.left.detach(), self.shared.owner.right.detach())

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out)."""
        return nn.functional.linear(self.shared.project(input, self), self.left, self.bias)

    @torch.no_grad()
    def take_off(self, columns: Tensor, share: float) -> None:
        """See `LosesPart`: of `left·right`, only the layer's own left factor changes."""
        held = self.left
        held.data -= (share * columns @ (columns.T @ held.data.float())).to(held.dtype)

    def attach_lora(self, lora: Any) -> None:
        """See `FusesLora`."""
        self.shared.attach(lora)

    def frozen_parameters(self) -> list[nn.Parameter]:
        """See `FusesLora`."""
        return [self.shared.owner.right, *self.parameters()]

    def product_dtype(self) -> torch.dtype:
        """See `FusesLora`."""
        return self.left.dtype

    def forward_with_lora(self, x: Tensor, up: Tensor, scaling: float) -> Tensor:
        """See `FusesLora`; the input of a group is projected once for all of its LoRAs."""
        h, z = self.shared.project_with_lora(x, self)
        bias = None if self.bias is None else self.bias.to(h.dtype)
        return cast(
            Tensor, Expand.apply(h, z, self.left.to(h.dtype), bias, up.to(h.dtype), scaling)
        )

    def reset_parameters(self) -> None:
        """Nothing to draw: the factors always come from a checkpoint."""

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear prints them, and the rank."""
        return f"{super().extra_repr()}, rank={self.rank}"
