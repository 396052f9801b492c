"""How compress grows: time and memory over depth, width, calibration samples and keep_ratio.

    python tools/bench_scale.py [--output scale.png]

Random Llama-shaped models; one quantity varies at a time and a power law is fitted to the stage's
seconds and peak bytes over what it takes at the smallest size (interpreter and libraries). Beside the
fitted exponents stand those that the operation count predicts: time is linear in depth and, once the
forward outweighs the eigenproblems, in samples, between them constant; it grows with the width to a
power between 2 (forward) and 3 (eigenproblems), and with keep_ratio at most to the square. Memory does
not depend on depth, grows with the width squared, linearly with the samples' hidden states, and hardly
with keep_ratio. The last line is one JSON object.
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
from emloc_llm.example import write_model, write_rows

assert emloc_llm
DEFAULT = {"depth": 4, "width": 512, "samples": 32, "keep_ratio": 0.3}
SWEEPS = {
    "depth": [2, 4, 8, 16],
    "width": [512, 1024, 1536, 2048],
    "samples": [16, 64, 256, 1024],
    "keep_ratio": [0.1, 0.2, 0.4, 0.8],
}
PREDICTED = {
    "depth": {"seconds": "1", "bytes": "0"},
    "width": {"seconds": "2 to 3", "bytes": "2"},
    "samples": {"seconds": "0 to 1", "bytes": "0 to 1"},
    "keep_ratio": {"seconds": "0 to 2", "bytes": "0 to 1"},
}


def measure(depth: int, width: int, samples: int, keep_ratio: float) -> tuple[float, float]:
    """Seconds and peak bytes of compress, in a process of its own."""
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
            "keep_ratio": keep_ratio,
        }  # fmt: skip
        command += [str(part) for key, value in named.items() for part in (f"--{key}", value)]
        subprocess.run(command, check=True, capture_output=True)
        measured = json.loads((root / "e" / "emloc.json").read_text())["measured"]
    return sum(measured["block_seconds"]), measured["peak_bytes"]


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
    _, own = measure(1, 64, 4, 0.3)
    table = Table(
        "over", "sizes", "seconds", "exponent", "predicted", "MiB", "exponent", "predicted"
    )
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(14, 6), layout="constrained")
    fitted: dict[str, dict[str, float]] = {}
    for column, (name, sizes) in enumerate(SWEEPS.items()):
        found = [measure(**{**DEFAULT, name: size}) for size in sizes]
        seconds, peaks = [f[0] for f in found], [f[1] - own for f in found]
        fits = {"seconds": exponent(sizes, seconds), "bytes": exponent(sizes, peaks)}
        fitted[name] = {key: round(value, 2) for key, value in fits.items()}
        table.add_row(
            name, ", ".join(map(str, sizes)), ", ".join(f"{s:.2f}" for s in seconds),
            f"{fits['seconds']:.2f}", PREDICTED[name]["seconds"],
            ", ".join(f"{p / 2**20:.0f}" for p in peaks), f"{fits['bytes']:.2f}",
            PREDICTED[name]["bytes"],
        )  # fmt: skip
        for row, (values, label) in enumerate(
            ((seconds, "seconds"), ([p / 2**20 for p in peaks], "peak MiB"))
        ):
            axes[row][column].loglog(sizes, values, "o-")
            axes[row][column].set(xlabel=name, ylabel=label)
    figure.savefig(options.output)
    Console().print(table)
    print(json.dumps(fitted))


if __name__ == "__main__":
    main()
