"""Codes along a trellis against grids: errors on normal numbers, the time to find and to decode them.

    python tools/bench_trellis.py [--numbers 131072] [--shapes 576x576 4096x4096] [--threads 1]

`errors`: mean squared errors of normally distributed numbers in sequences of 64, beside those of a grid in
groups of 64 and 128, and beside 4^-bits, below which no code gets [`error_ratio`: over the grid of 128].

`search`: processor time to find the codes of one column of a weight, in torch's operations over that of the
search that Numba compiled, on the CPU [search_ratio]; both find the same.

`decode`: processor time to make a dense float32 weight, over that of a grid of as many bits [decode_ratio].

The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from bench_formats import drawn
from rich.console import Console
from rich.table import Table
from torch import Tensor

from emloc.linalg import trellis_search
from emloc.linalg.grid import choose_grid
from emloc.linalg.rounding import Feedback
from emloc.linalg.trellis import STEPS, TRELLIS_BITS, sequences_of, values_of, windows_of

GRID_BITS = (2, 3, 4)


def seconds(run: Callable[[], object], times: int = 5) -> float:
    """The median processor time of a call, after one to warm up."""
    run()
    taken: list[float] = []
    for _ in range(times):
        started = time.process_time()
        run()
        taken.append(time.process_time() - started)
    return median(taken)


def errors(console: Console, count: int) -> dict[str, Any]:
    """Mean squared errors."""
    numbers = torch.randn(STEPS, count // STEPS, generator=torch.Generator().manual_seed(0))
    rows, feedback = numbers.T.reshape(-1, 1024), Feedback(torch.eye(1024))
    table = Table("bits", "trellis", "grid of 64", "grid of 128", "no code below", "error_ratio")
    figures: dict[str, Any] = {}
    for bits in TRELLIS_BITS:
        codes = trellis_search.best_codes(numbers, torch.ones_like(numbers), bits)
        off = values_of(windows_of(codes, bits), bits) - numbers
        shown = [float(off.square().mean())]
        for size in (64, 128) if bits in GRID_BITS else ():
            grid = choose_grid(rows, torch.ones(1024), bits, size)
            off = grid.values(feedback.round(rows, grid)) - rows
            shown.append(float(off.square().mean()))
        if bits in GRID_BITS:
            figures[str(bits)] = shown[0] / shown[2]
        cells = [f"{value:.4f}" for value in shown] + ["–"] * (3 - len(shown))
        ratio = f"{figures[str(bits)]:.2f}" if bits in GRID_BITS else "–"
        table.add_row(str(bits), *cells, f"{4.0**-bits:.4f}", ratio)
    console.print(table)
    return {"error_ratio": figures}


def search(console: Console) -> dict[str, Any]:
    """Time of one column."""
    compiled = trellis_search.compiled_search()
    if compiled is None:
        raise SystemExit("error: Numba is not installed; pip install 'emloc[numba]'")
    table = Table("rows", "bits", "Numba, ms", "torch, ms", "search_ratio")
    figures: dict[str, Any] = {}
    for rows in (576, 4096):
        for bits in TRELLIS_BITS:
            ours, plain = searched(rows, bits, compiled)
            figures[f"{rows} {bits}"] = plain / ours
            shown = f"{ours * 1e3:.2f}", f"{plain * 1e3:.1f}", f"{plain / ours:.0f}"
            table.add_row(str(rows), str(bits), *shown)
    console.print(table)
    return {"search_ratio": figures}


def searched(rows: int, bits: int, compiled: Any) -> tuple[float, float]:
    """Seconds of one column with Numba and without."""
    sequences, steps = sequences_of(rows)
    numbers, weights = torch.randn(rows), torch.ones(rows)
    made, taken = list[Tensor](), list[float]()
    for there in (compiled, None):
        trellis_search.compiled_search = lambda there=there: there
        values, windows = torch.zeros(rows), torch.zeros(steps, sequences, dtype=torch.uint8)

        def run(windows: Tensor = windows, values: Tensor = values) -> None:
            trellis_search.follow_column(numbers, weights, bits, False, windows, values)

        taken.append(seconds(run))
        made.append(values)
    trellis_search.compiled_search = lambda: compiled
    if not torch.equal(*made):
        raise SystemExit(f"error: {bits} bits, {rows} rows: both searches differ")
    return taken[0], taken[1]


def decode(console: Console, shapes: Sequence[str]) -> dict[str, Any]:
    """Time of a whole weight."""
    table = Table("shape", "bits", "trellis, ms", "grid, ms", "decode_ratio")
    figures: dict[str, Any] = {}
    for shape in shapes:
        d_out, d_in = map(int, shape.split("x"))
        for bits in GRID_BITS:
            taken: list[float] = []
            for kind in ("trellis", "quantized"):
                module: Any = drawn(f"{kind}{bits}", d_out, d_in, torch.float32)
                coded = module._operator(*module._stored())
                taken.append(seconds(lambda c=coded: c.dense(torch.float32)))
            ours, grid = taken
            figures[f"{shape} {bits}"] = ours / grid
            shown = f"{ours * 1e3:.2f}", f"{grid * 1e3:.2f}", f"{ours / grid:.2f}"
            table.add_row(shape, str(bits), *shown)
    console.print(table)
    return {"decode_ratio": figures}


def main() -> None:
    """Measure, print tables, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numbers", type=int, default=1 << 17)
    parser.add_argument("--shapes", nargs="+", default=["576x576", "4096x4096"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    console = Console(width=110)
    figures = {**errors(console, options.numbers), **search(console)}
    print(json.dumps({**figures, **decode(console, options.shapes)}))


if __name__ == "__main__":
    main()
