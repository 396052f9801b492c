"""Time of formats: a layer's step against bitsandbytes' NF4, and a block's fit against low rank.

    python tools/bench_formats.py [--part step fit] [--shapes 576x576 4096x4096 11008x4096 4096x11008]
        [--formats quantized4 nf4 …] [--tokens 2048] [--dtype float32] [--repeats 5]
        [--width 4096 --hidden 11008 --calibration_tokens 4096]

`step`: forward and backward of `--tokens` tokens through one layer, given as d_out x d_in, with a LoRA of
rank 16 beside it, as PEFT adds one (gradients of the LoRA and of the inputs), against the same LoRA on
bitsandbytes' `Linear4bit` (NF4, double quantisation) on the CPU. Both are run in turn in this process;
[step_ratio] is the median over rounds of their ratio. [dequantise_ratio] is the time to make the dense weight
over that of making a tensor of its size that is filled with one number, medians again; bitsandbytes' own is
beside it as `Linear4bit`. Times are the processor's, all threads together, so that other work counts little.

`fit`: the four groups of linear layers of one Llama block (width x width and hidden x width), random weights,
activations with a power-law spectrum and one outlier input. [fit_ratio] is the time of all fits over that of
low rank (keep_ratio 0.4) on the moments of the same tokens. A pass also runs the block and sums moments,
where formats differ in the side that they sum: [pass_ratio] is products of the block, moments and fits over
the same of low rank; attention, reading and writing, which are the same for all, are left out. `auto` is two
passes: prices of the whole menu without its probes (a run of the block on one sample per layer), then 4 bits.

Codes of a step are drawn at random: time does not depend on them. The last line is one JSON object, each
figure by shape and format.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from emloc.compression.menu_choice import price_forms
from emloc.formats.coded_low_rank import CODED_LOW_RANK
from emloc.formats.layer_format import DenseLayer, Form, GroupShape
from emloc.formats.low_rank import low_rank
from emloc.formats.low_rank_sizes import rank_for
from emloc.formats.menu import menu_of
from emloc.formats.quantized import QUANTIZED
from emloc.formats.quantized_residual import QUANTIZED_RESIDUAL
from emloc.formats.trellis import TRELLIS
from emloc.integrations.bitsandbytes.nf4_format import NF4_FORMAT
from emloc.linalg.gram import Moments
from emloc.linalg.trellis_search import prepare_search

KEEP_RATIO = 0.4
LORA_RANK = 16
REFERENCE, AUTO, LINEAR4BIT = "low_rank", "auto", "Linear4bit"
FORMATS = (
    "trellis2",
    "trellis3",
    "trellis4",
    "quantized2",
    "quantized3",
    "quantized4",
    "quantized8",
    "residual",
    "coded_low_rank",
    "nf4",
)
Figures = dict[str, dict[str, float]]


def form_of(name: str, d_out: int, d_in: int) -> Form:
    """The form that a row stands for."""
    rank = rank_for(KEEP_RATIO, d_out, d_in)
    residual = {"bits": 3, "group_size": 64, "residual_rank": 32, "factor_bits": 16}
    others = {
        "residual": Form(QUANTIZED_RESIDUAL, residual),
        "coded_low_rank": Form(CODED_LOW_RANK, {"rank": rank, "factor_bits": 4}),
        "nf4": Form(NF4_FORMAT),
        REFERENCE: low_rank(rank),
    }
    if name in others:
        return others[name]
    bits = int(name[-1])
    return TRELLIS.form(bits, 128) if name.startswith("trellis") else QUANTIZED.form(bits, 64)


class WithLora(nn.Module):
    """A layer with a LoRA beside it, as PEFT computes one."""

    def __init__(self, layer: Any, d_out: int, d_in: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(d_in, LORA_RANK, bias=False, dtype=dtype)
        self.up = nn.Linear(LORA_RANK, d_out, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, d_in) to (tokens, d_out)."""
        return self.layer(x) + self.up(self.down(x)) * 2.0


def drawn(name: str, d_out: int, d_in: int, dtype: torch.dtype) -> nn.Module:
    """A module of the format whose stored tensors are random."""
    form = form_of(name, d_out, d_in)
    layer = DenseLayer("layer", d_in, d_out, False, dtype, torch.device("cpu"))
    (module,) = form.format.modules([layer], form)
    for tensor in module.parameters():
        if tensor.dtype == torch.uint8:
            tensor.copy_(torch.randint(0, 256, tensor.shape, dtype=torch.uint8))
        elif tensor.dtype == torch.int32:
            tensor.copy_((torch.rand(tensor.shape) * 0.01).view(torch.int32))
        else:
            tensor.copy_(torch.randn(tensor.shape) * 0.02)
    return module


def linear4bit(d_out: int, d_in: int, dtype: torch.dtype) -> Any:
    """bitsandbytes' layer."""
    dense = nn.Linear(d_in, d_out, bias=False)
    made: Any = Linear4bit(
        d_in, d_out, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
    )
    made.load_state_dict(dense.state_dict())
    made = made.to("cpu")
    return made.train()


def seconds(run: Callable[[], object]) -> float:
    """The time of one call."""
    started = time.process_time()
    run()
    return time.process_time() - started


def step_of(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward."""

    def step() -> None:
        module.zero_grad()
        x.grad = None
        module(x).sum().backward()

    return step


def steps(d_out: int, d_in: int, names: Sequence[str], options: Any) -> tuple[Figures, Figures]:
    """`step_ratio` and `dequantise_ratio` by format, at one shape."""
    dtype = getattr(torch, options.dtype)
    x = torch.randn(options.tokens, d_in, dtype=dtype, requires_grad=True)
    theirs = linear4bit(d_out, d_in, dtype)
    their_step = step_of(WithLora(theirs, d_out, d_in, dtype), x)

    def filled() -> Tensor:
        return torch.empty(d_out, d_in, dtype=dtype).fill_(1.0)

    def their_weight() -> Tensor:
        state = theirs.weight.quant_state
        return dequantize_4bit(theirs.weight.data, state).to(dtype)

    def decode_times(run: Callable[[], object]) -> float:
        run()
        pairs = [(seconds(run), seconds(filled)) for _ in range(options.repeats)]
        return median(a for a, _ in pairs) / median(b for _, b in pairs)

    their_step()
    with torch.no_grad():
        decoding = {LINEAR4BIT: decode_times(their_weight)}
    ratios: dict[str, float] = {}
    for name in names:
        with torch.no_grad():
            module: Any = drawn(name, d_out, d_in, dtype)
            decoding[name] = decode_times(lambda made=module: made.weight.data)
        step = step_of(WithLora(module, d_out, d_in, dtype), x)
        step()
        ratios[name] = median(seconds(step) / seconds(their_step) for _ in range(options.repeats))
    key = f"{d_out}x{d_in}"
    return {key: ratios}, {key: decoding}


class Block:
    """The groups of one Llama block, with weights and tokens."""

    def __init__(self, width: int, hidden: int, tokens: int) -> None:
        self.shapes = [
            GroupShape(("q_proj", "k_proj", "v_proj"), (width,) * 3, width),
            GroupShape(("o_proj",), (width,), width),
            GroupShape(("gate_proj", "up_proj"), (hidden,) * 2, width),
            GroupShape(("down_proj",), (width,), hidden),
        ]
        self.weights = [[torch.randn(n, s.d_in) * 0.02 for n in s.d_out] for s in self.shapes]
        self._tokens = tokens

    def tokens(self, d_in: int) -> Tensor:
        """Inputs of a group."""
        made = torch.randn(self._tokens, d_in) * torch.arange(1, d_in + 1).pow(-0.5)
        made[:, 7] *= 100
        return made

    def timed(self, name: str) -> dict[str, float]:
        """Seconds of the products, of summing moments and of fitting."""
        groups = zip(self.shapes, self.weights)
        found = [self._group(name, shape, weights) for shape, weights in groups]
        return {part: sum(times[part] for times in found) for part in found[0]}

    def _group(self, name: str, shape: GroupShape, weights: Sequence[Tensor]) -> dict[str, float]:
        form = form_of("trellis4" if name == AUTO else name, shape.rows, shape.d_in)
        torch.manual_seed(shape.d_in)
        x, side, passes = self.tokens(shape.d_in), form.format.side(shape), 1 + (name == AUTO)
        moments, stacked, y = Moments(side, shape.owner), torch.cat(list(weights)), None

        def products() -> None:
            nonlocal y
            y = x @ stacked.T

        def summed() -> Tensor:
            assert y is not None
            moments.fold(x if side == "input" else y)
            return moments.matrix

        times = {"products": passes * seconds(products), "moments": passes * seconds(summed)}

        times["fit"] = 0.0
        if name == AUTO:
            times["fit"] = seconds(lambda: priced(shape, weights, moments))
            moments.derived.clear()  # the second pass sums them anew
        times["fit"] += seconds(lambda: form.format.fit(weights, moments, shape, form))
        return times


def priced(shape: GroupShape, weights: Sequence[Tensor], moments: Moments) -> None:
    """The prices of every layer's menu."""
    for single, weight in zip(shape.singles(), weights):
        price_forms(weight, moments, menu_of(single, 2))


def fits(names: Sequence[str], options: Any, console: Console) -> tuple[Figures, Figures]:
    """`fit_ratio` and `pass_ratio` by format."""
    torch.manual_seed(0)
    block = Block(options.width, options.hidden, options.calibration_tokens)
    prepare_search(torch.device("cpu"))  # compiling is no part of a fit
    found = {name: block.timed(name) for name in (REFERENCE, *names)}
    ours = found[REFERENCE]
    table = Table("format", "products s", "moments s", "fit s", "fit_ratio", "pass_ratio")
    fit_ratio = {name: times["fit"] / ours["fit"] for name, times in found.items()}
    pass_ratio = {n: sum(times.values()) / sum(ours.values()) for n, times in found.items()}
    for name, times in found.items():
        shown = [f"{times[part]:.1f}" for part in ("products", "moments", "fit")]
        table.add_row(name, *shown, f"{fit_ratio[name]:.2f}", f"{pass_ratio[name]:.2f}")
    console.print(table)
    key = f"{options.width}, {options.hidden}"
    return {key: fit_ratio}, {key: pass_ratio}


def main() -> None:
    """Measure, print tables, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", nargs="+", default=["step", "fit"], choices=["step", "fit"])
    parser.add_argument(
        "--shapes", nargs="+", default=["576x576", "4096x4096", "11008x4096", "4096x11008"]
    )
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=(*FORMATS, AUTO))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=11008)
    parser.add_argument("--calibration_tokens", type=int, default=4096)
    options = parser.parse_args()
    console, figures = Console(), dict[str, Figures]()
    names = [name for name in options.formats if name != AUTO]
    for shape in options.shapes if "step" in options.part else []:
        d_out, d_in = map(int, shape.split("x"))
        step, decoding = steps(d_out, d_in, names, options)
        figures.setdefault("step_ratio", {}).update(step)
        figures.setdefault("dequantise_ratio", {}).update(decoding)
        table = Table(f"{shape}, {options.dtype}", "step_ratio", "dequantise_ratio")
        for name in decoding[shape]:
            ratio = step[shape].get(name, 1.0)
            table.add_row(name, f"{ratio:.3f}", f"{decoding[shape][name]:.1f}")
        console.print(table)
    if "fit" in options.part:
        fit, whole = fits(options.formats, options, console)
        figures |= {"fit_ratio": fit, "pass_ratio": whole}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
