"""Formats of emulators against each other before any training: bits per weight, errors, KL to the base.

    python tools/sweep_formats.py --model_name_or_path MODEL --dataset train.jsonl --test test.jsonl
        [--column_map question=prompt,answer=completion] [--forms quantized:bits=3,group_size=64 ...]
        [--samples 64] [--test_samples 40] [--out sweep.jsonl] [--plot sweep.png]

The moments of all layers are summed once, on the base itself; then every form is fitted to all layers, and
the model runs with the weights that it stands for. `error` is the root of the mean over groups of the squared
relative errors of their outputs on the calibration data. `kl` is the divergence from the base's predictions
per answer token, for models that predict tokens; `output` the relative error of what other models give, such
as predicted noise. Bits per weight count all bytes of a layer's form, numbers without a dtype of their own as
16 bits, layers that stay dense as well. A form is `format:option=value,...`, with the options of compress.
NF4 is bitsandbytes' (groups of 64, scales quantised doubly). `emulator:FOLDER` is what compress has written,
such as one of `format=auto`. `loram-stru:keep_ratio=0.26` is the pruned model that LoRAM-STRU trains on, of
the bytes of such a low-rank emulator (with `protected_first=1,protected_last=0` for models of few blocks).
Each line of --out is one form; --from shows and plots lines of earlier runs beside those of this one, or with
--forms and nothing behind it by themselves.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.compression.choice import choose_groups
from emloc.compression.groups import dense_shapes, written_groups
from emloc.config import CompressConfig
from emloc.extend.capabilities import kept_dense_of, token_mask_of
from emloc.extend.formats import format_named
from emloc.extend.methods import Task
from emloc.extend.opening import open_model
from emloc.extend.plugin_options import of_family, with_plugin_options
from emloc.formats.layer_format import Form, GroupShape, Tensors, tensor_bytes
from emloc.linalg.convolution import as_matrix
from emloc.linalg.gram import Moments
from emloc.linalg.rounding import squared_output
from emloc.options.build import build
from emloc.streaming.input_rows import patches
from emloc.streaming.real_rows import real_rows

ITEMSIZE = 2
NF4 = "nf4"
EMULATOR = "emulator:"
LORAM = "loram-stru:"
NF4_BITS = 4.127  # 4, 8 per group of 64, 32 per 256 groups

FORMS = (
    NF4,
    *(f"trellis:bits={b}" for b in (4, 3, 2, 1)),
    *(f"trellis:bits={b},residual_rank={r},factor_bits=8" for b, r in ((3, 16), (2, 16), (2, 32))),
    *(f"quantized:bits={b},group_size={g}" for b, g in
      ((4, 32), (4, 64), (4, 128), (3, 32), (3, 64), (3, 128), (2, 32), (2, 64), (2, 128))),
    *(f"quantized:bits={b},group_size=64,residual_rank={r},factor_bits={f}"
      for b, r, f in ((3, 16, 8), (2, 16, 8), (2, 32, 8), (2, 64, 8), (2, 32, 16))),
    *(f"low_rank:keep_ratio={k}" for k in (0.25, 0.4, 0.6)),
    *(f"low_rank:factor_bits={f},bits_per_weight={b}"
      for f, b in ((4, 2.0), (4, 2.5), (4, 3.2), (8, 4.2))),
)  # fmt: skip


class Subject:
    """A loaded model, its groups and what it gives on the test data."""

    def __init__(self, options: argparse.Namespace) -> None:
        config = config_of(options, "low_rank:keep_ratio=0.5")
        checkpoint, self.family = open_model(config.model_name_or_path, None, None)
        config = of_family(config, self.family)
        self.model = self.family.load(checkpoint, "float32", "cpu")
        self.batches = self.family.calibration_batches(checkpoint, config)
        shown = config.model_copy(
            update={"dataset": str(options.test), "num_calibration_samples": options.test_samples}
        )
        self.test = self.family.calibration_batches(checkpoint, shown)
        plan = choose_groups(
            checkpoint.name, self.model, self.family.blocks(self.model),
            self.family.layer_groups(self.model), kept_dense_of(self.family, self.model), config,
            lambda name: tuple(self._matrix(name).shape), lambda _: ITEMSIZE,
        )  # fmt: skip
        self.shapes = [group.shape for group in plan.groups]
        self.weights = {
            name: self._matrix(name).clone() for shape in self.shapes for name in shape.layers
        }
        self.moments = self._moments()
        self.given = [self._output(batch) for batch in self.test]

    def _parameter(self, name: str) -> tuple[nn.Parameter, bool]:
        module = self.model.get_submodule(name)
        return module.get_parameter("weight"), type(module).__name__ == "Conv1D"

    def _matrix(self, name: str) -> Tensor:
        weight, transposed = self._parameter(name)
        return weight.detach().T if transposed else weight.detach()

    def _moments(self) -> dict[str, Moments]:
        moments = {shape.owner: Moments("input", shape.owner) for shape in self.shapes}
        batch: Mapping[str, Tensor] = {}
        handles = []

        def folding(shape: Any) -> Callable[..., None]:
            def fold(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                mask = token_mask_of(self.family, batch, shape.owner)
                x = inputs[0]
                if shape.kernel:
                    size = tuple(output.shape[-2:])
                    x = torch.stack([patches(module, image, size) for image in x])
                moments[shape.owner].fold(real_rows(x, mask, shape.owner))

            return fold

        for shape in self.shapes:
            module = self.model.get_submodule(shape.owner)
            handles.append(module.register_forward_hook(folding(shape)))
        with torch.no_grad():
            for batch in self.batches:
                self.family.loss(self.model, batch)
        for handle in handles:
            handle.remove()
        return {name: one for name, one in moments.items() if one.tokens}

    @torch.no_grad()
    def _output(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-probabilities at the answers' places, or what the model gives."""
        kept: list[Any] = []
        handle = self.model.register_forward_hook(lambda m, i, output: kept.append(output))
        self.family.loss(self.model, batch)
        handle.remove()
        output = kept[-1]
        if hasattr(output, "logits"):
            logits = output.logits
            if logits.ndim == 3:  # else the family asked for those at the answers' places alone
                logits = logits[:, :-1][batch["labels"][:, 1:] != -100]
            return torch.log_softmax(logits.float(), -1)
        return output.sample if hasattr(output, "sample") else output[0]

    def put(self, name: str, weight: Tensor) -> None:
        """Let a layer have another weight, d_out × d_in."""
        parameter, transposed = self._parameter(name)
        weight = weight.T if transposed else weight
        parameter.data.copy_(weight.reshape(parameter.shape))

    def emulator(self, folder: str) -> dict[str, Any]:
        """An emulator in place of the model."""
        manifest, base = Manifest.read(Path(folder)), self.model
        self.model = self.family.load(Checkpoint.open(folder), "float32", "cpu")
        compared, self.model = self.compare(), base
        groups = written_groups(manifest.layers, dense_shapes(manifest.layers, base))
        held = sum(tensor_bytes(group.shape, group.form, ITEMSIZE) for group in groups)
        emulated = {name for group in groups for name in group.layers}
        held += sum(
            one.numel * ITEMSIZE
            for shape in self.shapes
            for one in shape.singles()
            if one.owner not in emulated
        )
        weights = sum(shape.numel for shape in self.shapes)
        errors = [entry["relative_error"] for entry in manifest.layers.values()]
        return {
            "form": f"{manifest.settings['format']}:{Path(folder).name}",
            "bits_per_weight": 8 * held / weights,
            "error": (sum(e * e for e in errors) / len(errors)) ** 0.5,
            **compared,
            "fit_cpu_seconds": manifest.measured["seconds"],
        }

    def pruned(self, form: str, options: argparse.Namespace) -> dict[str, Any]:
        """The pruned model of LoRAM-STRU in place of the model."""
        from emloc_baselines.loram import LoramStru

        started = time.process_time()
        given = dict(pair.split("=") for pair in form.removeprefix(LORAM).split(","))
        own = {name: int(value) for name, value in given.items() if name != "keep_ratio"}
        data = {"dataset": str(options.dataset), "num_calibration_samples": options.samples}
        columns = {"column_map": options.column_map} if options.column_map else {}
        compress = {**data, **columns, **options.more, "format": "low_rank"}
        ratio = float(given["keep_ratio"])
        task = Task(str(options.model_name_or_path), ratio, 0, compress, {}, {}, own)
        base = self.model
        with tempfile.TemporaryDirectory() as folder:
            light = LoramStru().build(task, Path(folder) / "light")
            self.model = self.family.load(Checkpoint.open(str(light)), "float32", "cpu")
            compared = self.compare()
        gone = sum(p.numel() for p in base.parameters())
        gone -= sum(p.numel() for p in self.model.parameters())
        self.model = base
        weights = sum(shape.numel for shape in self.shapes)
        bits = 8 * ITEMSIZE * (weights - gone) / weights
        spent = time.process_time() - started
        return {"form": form, "bits_per_weight": bits, **compared, "fit_cpu_seconds": spent}

    def compare(self) -> dict[str, float]:
        """KL to the base per token, or the relative error of the outputs."""
        predicts = "labels" in self.test[0]
        total = terms = 0.0
        for batch, before in zip(self.test, self.given):
            after = self._output(batch)
            if predicts:
                total += float((before.exp() * (before - after)).sum())
                terms += len(before)
            else:
                total += float((after - before).square().sum())
                terms += float(before.square().sum())
        return {"kl": total / terms} if predicts else {"output": (total / terms) ** 0.5}


def config_of(options: argparse.Namespace, form: str) -> CompressConfig:
    """Compress's options for a form."""
    format, _, rest = form.partition(":")
    given = dict(pair.split("=") for pair in rest.split(",") if pair)
    more = {name: json.loads(value) for name, value in given.items()}
    columns = {"column_map": options.column_map} if options.column_map else {}
    return build(with_plugin_options(CompressConfig), dict(
        model_name_or_path=str(options.model_name_or_path), output_dir="unused",
        dataset=str(options.dataset), num_calibration_samples=options.samples, format=format,
        **columns, **options.more, **more,
    ), form)  # fmt: skip


def fitted(subject: Subject, form: str, options: argparse.Namespace) -> Iterator[Any]:
    """For every group: its shape, the weights that stand for its own, and bytes."""
    config = None if form == NF4 else config_of(options, form)
    for shape in subject.shapes:
        weights = [as_matrix(subject.weights[name]) for name in shape.layers]
        if shape.owner not in subject.moments:
            yield shape, weights, shape.numel * ITEMSIZE
        elif config is None:
            yield shape, [nf4(weight) for weight in weights], shape.numel * NF4_BITS / 8
        else:
            chosen = format_named(config.format).decide(shape, config, ITEMSIZE)
            if isinstance(chosen, str):
                yield shape, weights, shape.numel * ITEMSIZE
                continue
            outcome = chosen.format.fit(weights, subject.moments[shape.owner], shape, chosen)
            yield (
                shape,
                decoded(shape, chosen, outcome.tensors),
                tensor_bytes(shape, chosen, ITEMSIZE),
            )


def decoded(shape: GroupShape, form: Form, tensors: Tensors) -> list[Tensor]:
    """The dense weights that a group's tensors stand for, d_out × d_in each, float32."""

    def read(layer: str, name: str) -> Tensor:
        return tensors[layer, name]

    return [
        form.format.operator(shape, form, layer, read).dense(torch.float32)
        for layer in shape.layers
    ]


def nf4(weight: Tensor) -> Tensor:
    """The weight after bitsandbytes' NF4."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return dequantize_4bit(codes, state).view(weight.shape)


def measure(subject: Subject, form: str, options: argparse.Namespace) -> dict[str, Any]:
    """One form of all layers."""
    if form.startswith(EMULATOR):
        return subject.emulator(form.removeprefix(EMULATOR))
    if form.startswith(LORAM):
        return subject.pruned(form, options)
    started, spent, weights, errors = time.process_time(), 0.0, 0, []
    for shape, stood, size in fitted(subject, form, options):
        spent, weights = spent + size, weights + shape.numel
        lost = whole = 0.0
        for name, weight in zip(shape.layers, stood):
            original = as_matrix(subject.weights[name])
            if shape.owner in subject.moments:
                matrix = subject.moments[shape.owner].matrix
                lost += squared_output(original - weight, matrix)
                whole += squared_output(original, matrix)
            subject.put(name, weight)
        errors.append(lost / whole if whole else 0.0)
    return {
        "form": form,
        "bits_per_weight": 8 * spent / weights,
        "error": (sum(errors) / len(errors)) ** 0.5,
        **subject.compare(),
        "fit_cpu_seconds": time.process_time() - started,
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table, by bits."""
    table = Table("form", "bits per weight", "error of outputs", "KL or output error", "CPU s")
    for row in sorted(rows, key=lambda row: -row["bits_per_weight"]):
        table.add_row(
            row["form"], f"{row['bits_per_weight']:.2f}",
            f"{row['error']:.4f}" if "error" in row else "–",
            f"{row.get('kl', row.get('output')):.4f}", f"{row['fit_cpu_seconds']:.0f}",
        )  # fmt: skip
    Console(width=130).print(table)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bits against divergence, a line per kind of form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
    kinds: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        kind = row["form"].partition(":")[0]
        kind += ", propagated" if "propagated" in row["form"] else ""
        kind += ", residual" if "residual_rank" in row["form"] else ""
        kind += (
            ", factors of few bits" if kind == "low_rank" and "factor_bits" in row["form"] else ""
        )
        kinds.setdefault(kind, []).append(
            (row["bits_per_weight"], row.get("kl", row.get("output", 0.0)))
        )
    for kind, points in kinds.items():
        axes.plot(*zip(*sorted(points)), "o-", label=kind, markersize=4, linewidth=1)
    axes.set(
        xlabel="bits per weight", ylabel="KL to the base" if "kl" in rows[0] else "output error"
    )
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", type=Path)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--column_map")
    parser.add_argument("--more", type=json.loads, default={}, help="further options, as JSON")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--test_samples", type=int, default=40)
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--from", dest="earlier", type=Path, nargs="*", default=[])
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.forms and not (options.model_name_or_path and options.dataset):
        parser.error(
            "pass --model_name_or_path and --dataset, or --forms alone to show earlier runs"
        )
    options.test = options.test or options.dataset
    lines = [line for path in options.earlier for line in path.read_text().splitlines()]
    rows = [json.loads(line) for line in lines]
    subject = Subject(options) if options.forms else None
    for form in options.forms:
        assert subject is not None
        rows.append(measure(subject, form, options))
        print(json.dumps(rows[-1]), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    show(rows)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
