"""How compress grows: time and memory over depth, width, calibration samples and keep_ratio.

    python tools/bench_scale.py [--output scale.png]

Random Llama-shaped models; one quantity varies at a time, and a power law is fitted to the stage's
seconds and peak bytes over what it takes at the smallest size (interpreter and libraries). Beside the
fitted exponents stand those of the counts: the same fit to the operations (`operations`, float64 counted
twice) and bytes (`held_bytes`) that the algorithm needs at the same sizes. Where a fit exceeds its
count, small products run below the processor's speed or something other than products costs time.
The last line is one JSON object.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

import emloc_llm
from emloc.formats.low_rank_sizes import rank_for
from emloc.linalg.eigen import LARGEST
from emloc.linalg.lowrank import DENSE_BELOW
from emloc_llm.example import write_model, write_rows

assert emloc_llm
DEFAULT = {"depth": 4, "width": 512, "samples": 32, "keep_ratio": 0.3}
SWEEPS = {
    "depth": [2, 4, 8, 16],
    "width": [512, 1024, 1536, 2048],
    "samples": [16, 64, 256, 1024],
    "keep_ratio": [0.1, 0.2, 0.4, 0.8],
}
Shape = tuple[tuple[int, ...], int]
"""Widths of the outputs and of the common input of layers that are compressed together."""


def groups(width: int) -> list[Shape]:
    """Those of a block: query-key-value, output, gate-up, down."""
    inner = width * 11 // 4
    return [((width,) * 3, width), ((width,), width), ((inner,) * 2, width), ((width,), inner)]


def operations(depth: int, width: int, tokens: int, keep_ratio: float) -> float:
    """Multiplications of compress in float32's time: float64 counts twice."""
    total = 0.0
    for d_outs, d_in in groups(width):
        d_out = sum(d_outs)
        size, rank = min(d_out, d_in), rank_for(keep_ratio, d_out, d_in)
        total += tokens * (d_out * d_in + 9 / 16 * size**2)  # forward and moments
        cost = 0.0
        if d_out > d_in:  # WᵀW and its root, R G Rᵀ, then R⁻¹Z, W(R⁻¹Z), ZᵀR
            cost += 9 / 16 * d_out * d_in**2 + d_in**3 / 6 + 2 * 9 / 16 * d_in**3
            cost += rank * (d_in**2 + d_out * d_in)
        else:
            cost += rank * d_out * d_in  # UᵀW
        basis = 2.2 * rank
        if size < DENSE_BELOW or basis > LARGEST * size:  # tridiagonalise, solve, transform back
            cost += 3 * size**3
        else:  # products, orthogonalisation twice over, the projected problem, the vectors
            cost += basis * size**2 + 2 * basis**2 * size + 3 * basis**3 + size * basis * rank
        total += cost * (2 if size < DENSE_BELOW else 1)
    return depth * total


def held_bytes(depth: int, width: int, tokens: int, keep_ratio: float) -> float:
    """The block, all of its moments, the factors and workspace of one group, all hidden states."""
    shapes = groups(width)
    block = sum(sum(d_outs) * d_in for d_outs, d_in in shapes)
    moments = sum(min(sum(d_outs), d_in) ** 2 for d_outs, d_in in shapes)
    work = 0.0
    for d_outs, d_in in shapes:
        d_out = sum(d_outs)
        size, rank = min(d_out, d_in), rank_for(keep_ratio, d_out, d_in)
        double = 2 if size < DENSE_BELOW else 1
        work = max(work, double * (d_out * d_in + 2 * size**2 + rank * (d_out + d_in)))
    return 4 * (block + moments + work + tokens * width)


def measure(depth: int, width: int, samples: int, keep_ratio: float) -> tuple[float, float, int]:
    """Seconds, peak bytes and calibration tokens of compress, in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        base = write_model(
            root / "base", num_hidden_layers=depth, hidden_size=width, head_dim=width // 8,
            intermediate_size=width * 11 // 4, num_attention_heads=8, num_key_value_heads=8,
        )  # fmt: skip
        data = write_rows(root / "train.jsonl", samples, seed=0)
        command = [sys.executable, "-m", "emloc", "compress", "--output_dir", str(root / "e")]
        named = {
            "model_name_or_path": base, "dataset": data, "num_calibration_samples": samples,
            "format": "low_rank", "keep_ratio": keep_ratio,
        }  # fmt: skip
        command += [str(part) for key, value in named.items() for part in (f"--{key}", value)]
        subprocess.run(command, check=True, capture_output=True)
        manifest = json.loads((root / "e" / "emloc.json").read_text())
    measured, layers = manifest["measured"], manifest["layers"].values()
    tokens = max(layer["tokens"] for layer in layers)
    return sum(measured["block_seconds"]), measured["peak_bytes"], tokens


def exponent(sizes: list[float], values: list[float]) -> float:
    """Least-squares slope of log(values) over log(sizes)."""
    x, y = [math.log(s) for s in sizes], [math.log(max(v, 1e-9)) for v in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum(
        (a - mean_x) ** 2 for a in x
    )


def main() -> None:
    """Sweep, fit, plot, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("scale.png"))
    options = parser.parse_args()
    _, own, _ = measure(1, 64, 4, 0.3)
    table = Table("over", "sizes", "", "measured", "exponent", "of the count")
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(14, 6), layout="constrained")
    fitted: dict[str, dict[str, float]] = {}
    for column, (name, sizes) in enumerate(SWEEPS.items()):
        settings = [{**DEFAULT, name: size} for size in sizes]
        found = [measure(**setting) for setting in settings]
        counts = [
            {
                "depth": setting["depth"],
                "width": setting["width"],
                "tokens": tokens,
                "keep_ratio": setting["keep_ratio"],
            }
            for setting, (_, _, tokens) in zip(settings, found)
        ]
        for row, (label, values, count) in enumerate(
            (
                ("seconds", [f[0] for f in found], operations),
                ("MiB", [(f[1] - own) / 2**20 for f in found], held_bytes),
            )
        ):
            fit = exponent(sizes, values)
            expected = [count(**each) for each in counts]
            predicted = exponent(sizes, expected)
            fitted[f"{name}_{label.lower()}"] = {
                "exponent": round(fit, 2),
                "predicted": round(predicted, 2),
            }
            table.add_row(
                name, ", ".join(map(str, sizes)), label, ", ".join(f"{v:.2f}" for v in values),
                f"{fit:.2f}", f"{predicted:.2f}",
            )  # fmt: skip
            axes[row][column].loglog(sizes, values, "o-", label="measured")
            scale = values[-1] / expected[-1]
            axes[row][column].loglog(sizes, [scale * e for e in expected], "--", label="count")
            axes[row][column].set(xlabel=name, ylabel=label)
    axes[0][0].legend()
    figure.savefig(options.output)
    Console().print(table)
    print(json.dumps(fitted))


if __name__ == "__main__":
    main()
