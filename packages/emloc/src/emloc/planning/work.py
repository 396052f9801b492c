"""The time of a training step, by its operations on fake tensors and the speed of the device.

An operation takes a constant time, the longer of its multiplications and its bytes, and the time in which the
system clears the memory of a large result. Multiplications of matrix products, convolutions and attention are
counted by torch's own formulas (`torch.utils.flop_counter`).
Deep models are counted by shallow ones, as memory is (`emloc.planning.trace`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from emloc.extend.family import Batch
from emloc.machine.memory import LARGE_BYTES
from emloc.planning.family import LossOf
from emloc.planning.rates import NEAR, Rates
from emloc.planning.trace import SHALLOW, Answers, materialise

THIN = 64
"""The largest rank of a product that is bound by what it reads, as a LoRA's are."""


@dataclass
class Seconds(TorchDispatchMode):
    """A dispatch mode that adds up the time that operations would take.

    Attributes:
        rates: of the device.
        total: seconds so far.
    """

    rates: Rates
    total: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        made = func(*args, **named)
        self.total += self._taken(func, args, named, made)
        return made

    def _taken(self, func: Any, args: tuple[Any, ...], named: dict[str, Any], made: Any) -> float:
        storages = [t.untyped_storage() for t in tree_iter((args, named)) if isinstance(t, Tensor)]
        given = {id(storage) for storage in storages}
        outputs = [t for t in tree_iter(made) if isinstance(t, Tensor)]
        in_place = func._schema.name.endswith("_") or ".out" in str(func)
        if not in_place and all(id(t.untyped_storage()) in given for t in outputs):
            return 0.0  # a view
        tensors = [t for t in tree_iter((args, named, made)) if isinstance(t, Tensor)]
        sizes = [t.numel() * t.itemsize for t in tensors]
        moved = sum(sizes) / (self.rates.near if max(sizes, default=0) <= NEAR else self.rates.far)
        products = _multiplications(func, args, named, made)
        speed = self.rates.thin_products if _is_thin(func, args) else self.rates.products
        fresh = [size for t in outputs if (size := t.numel() * t.itemsize) >= LARGE_BYTES]
        new = 0 if in_place else sum(fresh)
        return self.rates.operation + max(moved, products / speed) + new / self.rates.fresh


def _multiplications(func: Any, args: tuple[Any, ...], named: dict[str, Any], made: Any) -> float:
    packet = func._overloadpacket
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(t.shape for t in args[:3])) / 2
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(t.shape for t in args[:4])) / 2
    counted = flop_registry.get(packet)
    return 0.0 if counted is None else counted(*args, **named, out_val=made) / 2


def _is_thin(func: Any, args: tuple[Any, ...]) -> bool:
    if func._overloadpacket not in (torch.ops.aten.mm, torch.ops.aten.addmm):
        return False
    left, right = [t for t in args if isinstance(t, Tensor) and t.dim() == 2][-2:]
    return min(*left.shape, *right.shape) <= THIN


def seconds_of(
    model: nn.Module, batch: Batch, loss_of: LossOf, autocast: bool, rates: Rates
) -> float:
    """Seconds of one micro-batch, forward and backward; what is on the meta device becomes fake."""
    with FakeTensorMode(allow_non_fake_inputs=True), Answers():
        materialise(model)
        fake = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in batch.items()}
        counted = Seconds(rates)
        device = next(iter(fake.values())).device.type
        with counted, torch.autocast(device, torch.bfloat16, enabled=autocast):
            total, terms = loss_of(model, fake)
            (total / terms).backward()
    return counted.total


def of_depth(blocks: Sequence[int], seconds: Callable[[Sequence[int]], float]) -> float:
    """Seconds of the whole model, by what one block more of each stack adds; see `extrapolate`."""
    if all(count <= SHALLOW + 1 for count in blocks):
        return seconds(blocks)
    start = [min(SHALLOW, count) for count in blocks]
    base = whole = seconds(start)
    for index, count in enumerate(blocks):
        if count > SHALLOW:
            deeper = [n + (i == index) for i, n in enumerate(start)]
            whole += (count - SHALLOW) * (seconds(deeper) - base)
    return whole
