"""Formats of emulators at the widths of large models: relative errors of a layer's outputs at equal bytes.

    python tools/sweep_shapes.py [--shapes 4096x4096 11008x4096] [--forms quantized:bits=2,group_size=64 ...]
        [--threads 1] [--out shapes.jsonl]

No model of 7 B parameters runs here, so weights and inputs are made up, d_out x d_in each; every form gets
the same. Second moments of the inputs have eigenvalues that fall like 1/i (i: their place), as far as the
width reaches, in directions drawn at random; channels differ by exp(0.5 normal), and one in 500 is 20 to 100
times as large as the others, like the outlier features of language models (LLM.int8(), arXiv 2208.07339).
Weights are Student-t with 5 degrees of freedom, rows differ by exp(0.3 normal), channels of large inputs are
smaller by the square root of their size; a tenth of the energy lies in directions whose singular values fall
like 1/sqrt(i).

`error` is the root of what the form loses of the squared outputs. Bits per weight count all bytes of a form.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sweep_formats import ITEMSIZE, NF4, NF4_BITS, decoded, nf4
from torch import Tensor

from emloc.config import CompressConfig
from emloc.extend.formats import format_named
from emloc.formats.layer_format import GroupShape, tensor_bytes
from emloc.linalg.gram import Moments
from emloc.linalg.rounding import squared_output
from emloc.options.build import build

FORMS = (
    NF4,
    *(f"trellis:bits={b}" for b in (4, 3, 2, 1)),
    *(f"trellis:bits={b},residual_rank={r},factor_bits=8"
      for b, r in ((3, 16), (3, 32), (2, 16), (2, 32), (1, 32))),
    *(f"quantized:bits={b},group_size={g}" for b, g in
      ((4, 64), (4, 128), (3, 32), (3, 64), (3, 128), (2, 32), (2, 64), (2, 128))),
    *(f"quantized:bits={b},group_size={g},residual_rank={r},factor_bits=8"
      for b, g, r in ((3, 128, 32), (2, 128, 16), (2, 128, 32), (2, 128, 64))),
    *(f"low_rank:bits_per_weight={b}" for b in (4.2, 3.2, 2.35)),
    *(f"low_rank:factor_bits=4,bits_per_weight={b}" for b in (4.2, 3.2, 2.35)),
)  # fmt: skip

LOW_RANK_SHARE = 0.1


def made_up(d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """A weight and the second moments of its inputs, as the module says."""
    generator = torch.Generator().manual_seed(d_out * 100_003 + d_in)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    places = torch.arange(1, d_in + 1, dtype=torch.float32)
    mixed = normal(d_in, d_in).mul_(places.rsqrt())
    size = torch.exp(0.5 * normal(d_in))
    outliers = torch.randperm(d_in, generator=generator)[: max(1, d_in // 500)]
    size[outliers] *= 20 + 80 * torch.rand(len(outliers), generator=generator)
    mixed.mul_(size[:, None])
    moments = mixed @ mixed.T
    del mixed
    # A normal over the root of a chi-square of 5 degrees of freedom, each a sum of squares.
    chi = sum((normal(d_out, d_in).square_() for _ in range(5)), torch.zeros(()))
    weight = normal(d_out, d_in).div_(chi.div_(5).sqrt_())
    weight.mul_(torch.exp(0.3 * normal(d_out))[:, None]).div_(size.sqrt())
    rank = min(d_out, d_in) // 8
    shared = (normal(d_out, rank) * places[:rank].rsqrt()) @ normal(rank, d_in)
    share = (LOW_RANK_SHARE / (1 - LOW_RANK_SHARE)) ** 0.5
    return weight.add_(shared.mul_(share * weight.norm() / shared.norm())), moments


def measure(form: str, weight: Tensor, moments: Tensor) -> dict[str, Any]:
    """Bits, error and processor time of one form."""
    d_out, d_in = weight.shape
    shape = GroupShape(("layer",), (d_out,), d_in)
    started = time.process_time()
    if form == NF4:
        stood, size = nf4(weight), weight.numel() * NF4_BITS / 8
    else:
        format, _, rest = form.partition(":")
        given = {n: json.loads(v) for n, v in (pair.split("=") for pair in rest.split(","))}
        config = build(
            CompressConfig,
            {"model_name_or_path": "none", "output_dir": "none", "format": format, **given},
            form,
        )
        chosen = format_named(format).decide(shape, config, ITEMSIZE)
        assert not isinstance(chosen, str), chosen
        side = chosen.format.side(shape)
        matrix = moments if side == "input" else weight @ moments @ weight.T
        sums = Moments.of_matrix(side, "layer", matrix, 4 * d_in)
        outcome = chosen.format.fit([weight], sums, shape, chosen)
        stood = decoded(shape, chosen, outcome.tensors)[0]
        size = tensor_bytes(shape, chosen, ITEMSIZE)
    seconds = time.process_time() - started
    lost = squared_output(weight - stood, moments) / squared_output(weight, moments)
    return {
        "shape": f"{d_out}x{d_in}",
        "form": form,
        "bits_per_weight": 8 * size / weight.numel(),
        "error": lost**0.5,
        "fit_cpu_seconds": seconds,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=["4096x4096"])
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    table = Table("shape", "form", "bits per weight", "error", "CPU s")
    for shape in options.shapes:
        d_out, _, d_in = shape.partition("x")
        weight, moments = made_up(int(d_out), int(d_in))
        for form in options.forms:
            row = measure(form, weight, moments)
            print(json.dumps(row), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            table.add_row(
                row["shape"], row["form"], f"{row['bits_per_weight']:.2f}", f"{row['error']:.4f}",
                f"{row['fit_cpu_seconds']:.0f}",
            )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
