"""The layers of torch, PEFT and our own in sizes: what each makes, and what autograd keeps of it.

Weights are frozen, so a linear layer keeps its input only for a LoRA beside it; a convolution keeps it in
any case. Tests run the real layers and count. Facts of torch 2.13, PEFT 0.21, transformers 5.23.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from emloc.planning.step import FLOAT32, Precision, StepTape
from emloc.planning.tape import Sized, Storage


@dataclass(frozen=True)
class Layer:
    """One linear layer or convolution.

    Attributes:
        d_in, d_out: of its weight as a matrix; a convolution's d_in is a patch.
        rank: of its two factors; None where it is dense.
        group: layers of one group share the right factor, and its product with their input.
        lora_rank: 0 without a LoRA.
        channels: of a convolution, its input channels; 0 for a linear layer.
        watched: elements per row that a hook makes and lets go of when the layer has run.
        working: bytes that the layer itself makes and lets go of, forward and backward.
    """

    d_in: int
    d_out: int
    rank: int | None = None
    group: str = ""
    group_size: int = 1
    lora_rank: int = 0
    channels: int = 0
    watched: int = 0
    working: int = 0


@dataclass
class Forward:
    """Operations on a tape, in one precision.

    Attributes:
        on_gpu: whether the kernels are those of a GPU, where they keep other tensors.
    """

    tape: StepTape
    precision: Precision
    on_gpu: bool = False

    def cast(self, x: Sized, itemsize: int) -> Sized:
        """A copy in another dtype; the tensor itself where it has that already."""
        if x.itemsize == itemsize:
            return x
        return self.tape.operation([x], self.tape.new(x.numel, itemsize))

    def product_input(self, x: Sized) -> Sized:
        """`x` as a matrix product takes it."""
        return self.cast(x, self.precision.product) if self.precision.autocast else x

    def new(self, x: Sized, *saves: Sized, numel: int | None = None) -> Sized:
        """An elementwise operation on `x` that keeps `saves`, or a copy."""
        out = self.tape.new(x.numel if numel is None else numel, x.itemsize)
        return self.tape.operation([x], out, saves)

    def weighted(self, x: Sized) -> Sized:
        """`x` times a vector that wants no gradient."""
        return self.tape.operation([x], self.tape.new(x.numel, x.itemsize), weight=True)

    def add(self, a: Sized, b: Sized) -> Sized:
        """`a + b`, in the wider dtype; the gradient goes to both as it is."""
        item = max(a.itemsize, b.itemsize)
        out = self.tape.new(max(a.numel, b.numel), item)
        same = a.nbytes == b.nbytes == out.nbytes
        return self.tape.operation([a, b], out, passes=same)

    def mul(self, a: Sized, b: Sized) -> Sized:
        """`a · b`; each is kept for the other's gradient."""
        out = self.tape.new(max(a.numel, b.numel), max(a.itemsize, b.itemsize))
        saves = ([b] if a.key is not None else []) + ([a] if b.key is not None else [])
        return self.tape.operation([a, b], out, saves)

    def cat(self, *parts: Sized) -> Sized:
        """One tensor of several; each part's gradient is a view."""
        out = self.tape.new(sum(part.numel for part in parts), parts[0].itemsize)
        sizes = [part.nbytes for part in parts if part.key is not None]

        def back(gradients: list[Storage]) -> list[Storage]:
            return [gradients[0] for _ in sizes]

        return self.tape.custom(parts, [out], (), back)[0]

    def split(self, x: Sized, numels: Sequence[int]) -> list[Sized]:
        """Views of consecutive parts; backward, their gradients become one tensor."""
        parts = [Sized(x.storage, numel, x.itemsize) for numel in numels]

        def back(_: list[Storage]) -> list[Storage]:
            return [Storage(self.tape, x_nbytes)]

        x_nbytes = x.nbytes
        return self.tape.custom([x], parts, (), back)

    # -- layers with weights ----------------------------------------------------------------------

    def linear(self, x: Sized, layer: Layer) -> Sized:
        """One layer that reads `x`."""
        return self.reading(x, layer)[0]()

    def reading(self, x: Sized, *layers: Layer) -> "list[Read]":
        """Layers that read the same tensor, to be called once each, in order."""
        shared = _Shared(x)
        return [Read(self, shared, layer, layers) for layer in layers]

    def dense(self, x: Sized, d_in: int, d_out: int, working: int = 0) -> Sized:
        """`x @ Wᵀ` with a frozen weight, which may be made of something else for `working` bytes."""
        out = self.tape.new(x.numel // d_in * d_out, self.precision.product)
        self.tape.work(working)
        return self.tape.operation([x], out, weight=True, backward_work=working)

    def watch(self, layer: Layer, rows: int) -> None:
        """Count what a hook on the layer does now."""
        if layer.watched:
            self.tape.work(rows * layer.watched * self.precision.product)

    def slice(self, x: Sized, numel: int) -> Sized:
        """A view of a part; its gradient is made as large as the whole."""
        whole = x.nbytes

        def back(_: list[Storage]) -> list[Storage]:
            return [Storage(self.tape, whole)]

        return self.tape.custom([x], [Sized(x.storage, numel, x.itemsize)], (), back)[0]

    def conv(self, x: Sized, layer: Layer, pixels: int) -> Sized:
        """A convolution that writes so many pixels, all samples counted; it keeps its input."""
        if layer.lora_rank:
            return self._conv_with_lora(x, layer, pixels)
        if layer.rank is None:
            self.tape.work(layer.working)
            y = self._conv(x, pixels * layer.d_out)
            self.watch(layer, pixels)
            return y
        return self._conv(self._conv(x, pixels * layer.rank), pixels * layer.d_out)

    def _conv(self, x: Sized, numel: int) -> Sized:
        x = self.product_input(x)
        return self.tape.operation([x], self.tape.new(numel, self.precision.product), [x])

    def _conv_with_lora(self, x: Sized, layer: Layer, pixels: int) -> Sized:
        tape, item, rank = self.tape, self.precision.product, layer.lora_rank
        item = item if self.precision.autocast else self.precision.lora
        y = self.conv(x, replace(layer, lora_rank=0), pixels)
        x = self.product_input(self.cast(x, self.precision.lora))
        a = tape.parameter(rank * layer.d_in, self.precision.lora)
        z = tape.operation([x, a], tape.new(pixels * rank, item), [x])
        b = tape.parameter(rank * layer.d_out, self.precision.lora)
        delta = tape.operation([z, b], tape.new(pixels * layer.d_out, item), [z])
        del z, a, b
        delta, out_item = self.new(delta), y.itemsize
        y = self.add(y, delta)
        del delta
        return self.cast(y, out_item)

    # -- norms, activations, attention ------------------------------------------------------------

    def rms_norm(self, x: Sized, width: int) -> Sized:
        """transformers' RMSNorm: computed in float32, multiplied by a frozen weight."""
        item = x.itemsize
        x = self.cast(x, FLOAT32)
        x = self.divided_by_rms(x, width)
        return self.weighted(self.cast(x, item))

    def divided_by_rms(self, x: Sized, width: int) -> Sized:
        """`x / √(mean(x²) + ε)` of rows of float32, one operation after another."""
        tape, rows = self.tape, x.numel // width
        squares = tape.operation([x], tape.new(x.numel, FLOAT32), [x], backward_work=2 * x.nbytes)
        mean = tape.operation([squares], tape.new(rows, FLOAT32))
        del squares
        mean = tape.operation([mean], tape.new(rows, FLOAT32), passes=True)  # + ε
        scale = tape.operation([mean], root := tape.new(rows, FLOAT32), [root])
        del mean, root
        out = tape.new(x.numel, FLOAT32)
        return tape.operation([x, scale], out, [x, scale], backward_work=x.nbytes)

    def layer_norm(self, x: Sized, width: int) -> Sized:
        """torch's LayerNorm, weight and bias frozen or absent."""
        return self._norm(x, x.numel // width)

    def group_norm(self, x: Sized, groups: int) -> Sized:
        """torch's GroupNorm of one sample after another; `groups` counts those of all samples."""
        return self._norm(x, groups)

    def _norm(self, x: Sized, statistics: int) -> Sized:
        item = FLOAT32 if self.precision.autocast else x.itemsize
        x = self.cast(x, item)
        out = self.tape.new(x.numel, item)
        mean, root = (self.tape.new(statistics, item) for _ in range(2))
        return self.tape.operation([x], out, [x, mean, root])

    def activation(self, x: Sized) -> Sized:
        """SiLU, GELU: keeps its input."""
        return self.new(x, x)

    def attention(
        self, q: Sized, k: Sized, v: Sized, head: int, mask: Sized | None = None
    ) -> Sized:
        """Fused attention: keeps its inputs, its result, and one number per row and head.

        Args:
            head: width of a head.
            mask: additive, of the dtype of `q`.
        """
        out = self.tape.new(q.numel, q.itemsize)
        rows = self.tape.new(q.numel // head, FLOAT32)
        saves = [q, k, v, out, rows, *([] if mask is None else [mask])]
        return self.tape.operation([q, k, v], out, saves)


@dataclass
class _Shared:
    """An input, and the products of right factors with it that a group has yet to take."""

    x: Sized
    products: dict[str, Sized] = field(default_factory=dict[str, Sized])
    loras: dict[int, Sized] = field(default_factory=dict[int, Sized])


@dataclass
class Read:
    """One layer's product with an input that others may read too."""

    forward: Forward
    shared: _Shared
    layer: Layer
    layers: Sequence[Layer]

    def __call__(self) -> Sized:
        """The layer's output."""
        x, layer = self.shared.x, self.layer
        if layer.rank is not None and layer.lora_rank and self.forward.precision.fuses:
            return self._fused(x)
        return self._with_lora(x) if layer.lora_rank else self._base(x)

    def _base(self, x: Sized) -> Sized:
        forward, layer = self.forward, self.layer
        x = forward.product_input(x)
        if layer.rank is None:
            y = forward.dense(x, layer.d_in, layer.d_out, layer.working)
            forward.watch(layer, x.numel // layer.d_in)
            return y
        h = self._product(x)
        return forward.dense(h, layer.rank, layer.d_out)

    def _product(self, x: Sized) -> Sized:
        """`x @ rightᵀ`, which is there until the last layer of the group has taken it."""
        layer = self.layer
        assert layer.rank is not None
        if layer.group not in self.shared.products:
            made = self.forward.dense(x, layer.d_in, layer.rank)
            self.shared.products[layer.group] = made
        if self._is_last_of_group():
            return self.shared.products.pop(layer.group)
        return self.shared.products[layer.group]

    def _members(self) -> list[Layer]:
        return [other for other in self.layers if other.group == self.layer.group]

    def _is_last_of_group(self) -> bool:
        return self.layer is self._members()[-1]

    def _with_lora(self, x: Sized) -> Sized:
        """PEFT's `result + lora_B(lora_A(x)) · scaling`."""
        y = self._base(x)
        forward, layer, precision = self.forward, self.layer, self.forward.precision
        tape = forward.tape
        item = precision.product if precision.autocast else precision.lora
        x = forward.cast(x, precision.lora)
        x = forward.product_input(x)
        rows = x.numel // layer.d_in

        def weight(numel: int) -> tuple[Sized, list[Sized]]:
            made = tape.parameter(numel, precision.lora)
            return made, [forward.cast(made, item)] if item != precision.lora else []

        a, a_cast = weight(layer.lora_rank * layer.d_in)
        z = tape.operation(
            [x, *(a_cast or [a])], tape.new(rows * layer.lora_rank, item), [x, *a_cast]
        )
        b, b_cast = weight(layer.lora_rank * layer.d_out)
        delta = tape.operation(
            [z, *(b_cast or [b])], tape.new(rows * layer.d_out, item), [z, *b_cast]
        )
        del z, a, b, a_cast, b_cast
        delta = forward.new(delta)
        out_item = y.itemsize
        y = forward.add(y, delta)
        del delta
        return forward.cast(y, out_item)

    def _fused(self, x: Sized) -> Sized:
        """`low_rank_products`: `Project` for the group at once, then `Expand`."""
        forward, layer, precision = self.forward, self.layer, self.forward.precision
        tape, rows, item = forward.tape, x.numel // layer.d_in, precision.product
        if layer.group not in self.shared.products:
            self._project(x, rows, item)
        h = (
            self.shared.products.pop(layer.group)
            if self._is_last_of_group()
            else self.shared.products[layer.group]
        )
        z = self.shared.loras.pop(id(layer))
        b = tape.parameter(layer.lora_rank * layer.d_out, precision.lora)
        b = forward.cast(b, item)
        y = tape.new(rows * layer.d_out, item)
        return tape.operation([h, z, b], y, [z, b])

    def _project(self, x: Sized, rows: int, item: int) -> None:
        forward, layer, precision = self.forward, self.layer, self.forward.precision
        tape, members = forward.tape, [m for m in self._members() if m.lora_rank]
        x = forward.product_input(x)
        downs = [
            forward.cast(tape.parameter(m.lora_rank * m.d_in, precision.lora), item)
            for m in members
        ]
        total = sum(m.lora_rank for m in members)
        joined = Sized(tape.new(rows * total, item).storage, rows * total, item)
        assert layer.rank is not None
        h = tape.new(rows * layer.rank, item)
        parts = [Sized(joined.storage, rows * m.lora_rank, item) for m in members]
        x_bytes = x.nbytes if x.key is not None else 0
        down_bytes = sum(down.nbytes for down in downs)

        def back(_: list[Storage]) -> list[Storage]:
            gathered = Storage(tape, rows * total * item if len(members) > 1 else 0)
            of_x = [Storage(tape, x_bytes)] if x_bytes else []
            of_downs = Storage(tape, down_bytes)
            del gathered
            return [*of_x, *(of_downs for _ in downs)]

        made = tape.custom([x, *downs], [h, *parts], [x, *downs], back)
        self.shared.products[layer.group] = made[0]
        self.shared.loras.update({id(m): part for m, part in zip(members, made[1:])})
