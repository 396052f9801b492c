"""Time of one layer's compression against the textbook route, and its error against the optimum.

    python tools/bench_compress.py [--shapes 4096x4096 11008x4096 4096x11008] [--keep_ratio 0.4]

The textbook route (SVD-LLM and others, as the papers write it): whiten with the eigendecomposition of
the input Gram, `S = Q √Λ`, an explicit inverse of S, a full SVD of `W S`, truncated. Ours: EMLoC's
`factorise`. Both in float32, in the same run, on the same weight and activations; the moments, which
both need, are summed outside of the clock (ours sums outputs where that is the smaller side).

Weights are Gaussian; activations have a power-law spectrum and one outlier dimension, as those of
language models have. Errors `‖(W − W_e) Xᵀ‖` are computed in float64, and the optimum is the tail of
the float64 eigenvalues of `W G Wᵀ`. The last line is one JSON object; `speedup` is the ratio of the
total times, `speedups` those per shape; `excess_error` is the worst.
"""

import argparse
import json
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from emloc.formats.low_rank_sizes import rank_for
from emloc.linalg.gram import Moments, smaller_side
from emloc.linalg.lowrank import factorise

TOKENS = 8192


def textbook(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> tuple[Any, Any]:
    """Whiten, full SVD, unwhiten."""
    values, vectors = torch.linalg.eigh(gram)
    whitening = vectors * values.clamp(min=values.max() * 1e-7).sqrt()
    inverse = torch.linalg.inv(whitening)
    u, s, vt = torch.linalg.svd(weight @ whitening, full_matrices=False)
    return u[:, :rank] * s[:rank], vt[:rank] @ inverse


def optimum(outputs: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, rank: int) -> float:
    """Root of the float64 eigenvalue tail, on the smaller side."""
    if weight.shape[0] > weight.shape[1]:
        outputs = tokens @ torch.linalg.qr(weight)[1].T
    values = torch.linalg.eigvalsh(outputs.T @ outputs).flip(0)
    return float(values[rank:].clamp(min=0).sum()) ** 0.5


def measure(d_out: int, d_in: int, keep_ratio: float) -> dict[str, float]:
    """Seconds and errors at one shape."""
    torch.manual_seed(0)
    rank = rank_for(keep_ratio, d_out, d_in)
    weight = torch.randn(d_out, d_in) * 0.02
    tokens = torch.randn(TOKENS, d_in) * torch.arange(1, d_in + 1).pow(-0.5)
    tokens[:, 7] *= 100
    moments = Moments(smaller_side(d_out, d_in), "layer")
    moments.fold(tokens if moments.side == "input" else tokens @ weight.T)
    started = time.perf_counter()
    ours = factorise(weight, moments, rank)
    our_seconds = time.perf_counter() - started
    gram = tokens.T @ tokens
    started = time.perf_counter()
    left, right = textbook(weight, gram, rank)
    seconds = time.perf_counter() - started
    del gram
    x, w = tokens.double(), weight.double()
    y = x @ w.T
    best = optimum(y, w, x, rank)

    def excess(left: torch.Tensor, right: torch.Tensor) -> float:
        return float((y - (x @ right.double().T) @ left.double().T).norm()) / best - 1

    return {
        "rank": rank,
        "seconds": our_seconds,
        "textbook_seconds": seconds,
        "speedup": seconds / our_seconds,
        "excess_error": excess(ours.left, ours.right),
        "estimated_excess": ours.excess,
        "textbook_excess": excess(left, right),
    }


def main() -> None:
    """Measure all shapes, print a table, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--keep_ratio", type=float, default=0.4)
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    table = Table("d_out x d_in", "rank", "textbook s", "ours s", "speedup", "excess", "textbook's")
    for shape in options.shapes:
        d_out, d_in = map(int, shape.split("x"))
        row = found[shape] = measure(d_out, d_in, options.keep_ratio)
        table.add_row(
            shape, str(row["rank"]), f"{row['textbook_seconds']:.2f}", f"{row['seconds']:.2f}",
            f"{row['speedup']:.1f}", f"{row['excess_error']:.1e}", f"{row['textbook_excess']:.1e}",
        )  # fmt: skip
    Console().print(table)
    ours, theirs = (sum(r[k] for r in found.values()) for k in ("seconds", "textbook_seconds"))
    figures = {
        "speedup": theirs / ours,
        "speedups": {shape: row["speedup"] for shape, row in found.items()},
        "excess_error": max(row["excess_error"] for row in found.values()),
        "textbook_excess_error": max(row["textbook_excess"] for row in found.values()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
