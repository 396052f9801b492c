"""Large models on one GPU: decoding, steps of training, and training streamed from pinned memory.

    python tools/bench_gpu.py decode
    python tools/bench_gpu.py fit
    python tools/bench_gpu.py step [--shapes 7B 38B 70B] [--ways lora qlora trellis2 quantized2 low_rank]
    python tools/bench_gpu.py streamed [--shapes 7B 38B] [--tokens 4096 16384] [--memory 24]

Weights are random and of a language model of the given widths: Llama-2-7B's and 70B's, and Qwen2.5-32B's
with 75 blocks, which makes 38 B parameters. No checkpoint of theirs is needed or read.

`decode`: the time to make a dense bfloat16 weight of its codes, against bitsandbytes' `dequantize_4bit` on
the same shape [decode_ratio], and that both ways of ours give the same numbers.

`fit`: the time to find the codes of one weight along a trellis, against the same on the CPU [fit_ratio].

`step`: forward, backward and AdamW of a LoRA of rank 16 on every linear layer of the blocks, one sample of
`--length` tokens (2,048), gradient checkpointing, bfloat16 autocast, as `emloc train` has it: seconds
(median of three after two), peak bytes of torch's allocator, and both over QLoRA's (bitsandbytes'
`Linear4bit`, NF4 with double quantisation) in the same run [step_ratio, peak_ratio]. Embeddings and head
are in 16 bits for all.

`streamed`: the same LoRA on the model in 16 bits whose blocks wait in pinned memory (and once in 4 bits),
with torch's allocator held to `--memory` GiB, micro-batches of 2,048 tokens: seconds per step, tokens per
second, peak bytes, the bytes that a step copies to the GPU, and the share of the step that the same copies
take alone. QLoRA in memory, its micro-batches one after another, is beside it [tokens_ratio]. A block's
weights are those of one of four that lie on disk, each copied for every block that stands for it. The last
line is JSON.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_formats import form_of
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from emloc.artefacts.checkpoint import Checkpoint
from emloc.extend.plugins import family_named
from emloc.formats.layer_format import DenseLayer
from emloc.integrations.peft.fused_lora import fuse_lora
from emloc.layers.coded_weight import CodedWeight
from emloc.layers.trellis_weight import TrellisWeight
from emloc.linalg.gram import Moments
from emloc.linalg.trellis_rounding import fitted_trellis
from emloc.machine.memory import format_bytes
from emloc.streaming.streamed_model import StreamedModel

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
RANK, MICRO = 16, 2048
DECODED = (
    "trellis2", "trellis3", "trellis4", "quantized2", "quantized3", "quantized4", "quantized8",
)  # fmt: skip

STORED = 4
"""Blocks that lie on disk."""


@dataclass(frozen=True)
class Shape:
    """Widths of a model."""

    hidden: int
    inner: int
    blocks: int
    heads: int
    pairs: int
    words: int

    def config(self, blocks: int | None = None) -> LlamaConfig:
        """The same widths as a configuration of transformers."""
        return LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.inner,
            num_hidden_layers=blocks or self.blocks, num_attention_heads=self.heads,
            num_key_value_heads=self.pairs, vocab_size=self.words, max_position_embeddings=4096,
            tie_word_embeddings=False, dtype=DTYPE, attn_implementation="sdpa",
        )  # fmt: skip


SHAPES = {
    "7B": Shape(4096, 11008, 32, 32, 32, 32000),
    "38B": Shape(5120, 27648, 75, 40, 8, 152064),
    "70B": Shape(8192, 28672, 80, 64, 8, 32000),
}


def seconds(run: Callable[[], object], warm: int = 2, times: int = 3) -> float:
    """The median time of a call, the GPU's work included."""
    taken: list[float] = []
    for _ in range(warm + times):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return median(taken[warm:])


def drawn(name: str, d_out: int, d_in: int) -> nn.Module:
    """A module of one of our formats with random codes, on the GPU."""
    form = form_of(name, d_out, d_in)
    (module,) = form.format.modules([DenseLayer("layer", d_in, d_out, False, DTYPE, DEVICE)], form)
    for tensor in module.parameters():
        if tensor.dtype == torch.uint8:
            tensor.copy_(torch.randint(0, 256, tensor.shape, dtype=torch.uint8, device=DEVICE))
        elif tensor.dtype == torch.int32:
            tensor.copy_((torch.rand(tensor.shape, device=DEVICE) * 0.01).view(torch.int32))
        else:
            tensor.copy_(torch.randn(tensor.shape, device=DEVICE, dtype=tensor.dtype) * 0.02)
    return module


def layer(way: str, dense: nn.Linear) -> nn.Module:
    """What stands for a linear layer, on the GPU."""
    d_out, d_in = dense.weight.shape
    if way not in ("lora", "qlora"):
        return drawn(way, d_out, d_in)
    weight = torch.randn(d_out, d_in, device=DEVICE, dtype=DTYPE) * 0.02
    made: Any
    if way == "lora":
        made = nn.Linear(d_in, d_out, bias=False, device="meta")
        made.weight = nn.Parameter(weight, requires_grad=False)
        return made
    made = Linear4bit(
        d_in, d_out, bias=False, compute_dtype=DTYPE, compress_statistics=True,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    made.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to(DEVICE)
    return made


def in_memory(shape: Shape, way: str) -> Any:
    """The whole model on the GPU, with a LoRA."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(shape.config(), dtype=DTYPE)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            model.set_submodule(name, layer(way, module))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.randn(parameter.shape, device=DEVICE, dtype=DTYPE) * 0.02
                values = values if parameter.dim() > 1 else torch.ones_like(values)
                module.register_parameter(name, nn.Parameter(values, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(DEVICE)
    model.is_loaded_in_4bit = way == "qlora"
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    made = get_peft_model(model, lora())
    fuse_lora(made)
    return made.train()


def lora() -> LoraConfig:
    """On every linear layer of the blocks."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, task_type="CAUSAL_LM")


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW of what is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)


def batches(shape: Shape, tokens: int, length: int) -> list[Tensor]:
    """Samples of so many tokens in all."""
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randint(shape.words, (1, length), generator=draw).to(DEVICE)
        for _ in range(tokens // length)
    ]


def loss_of(model: Any, ids: Tensor) -> tuple[Tensor, None]:
    """The mean loss of one sample; every eighth token is an answer's."""
    labels = torch.where(torch.arange(ids.shape[1], device=DEVICE) % 8 == 0, ids, -100)
    with torch.autocast("cuda", DTYPE):
        return model(input_ids=ids, labels=labels).loss, None


def free() -> None:
    """Give back what is not held any more."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def decode(console: Console) -> dict[str, Any]:
    """Time of decoding against bitsandbytes'."""
    table = Table("shape", "form", "ms", "GB/s written", "bitsandbytes NF4, ms", "decode_ratio")
    figures: dict[str, Any] = {}
    for d_out, d_in in ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192)):
        weight = torch.randn(d_out, d_in, device=DEVICE, dtype=DTYPE)
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        theirs = seconds(lambda p=packed, s=state: dequantize_4bit(p, s), 3, 9)
        for form in DECODED:
            module: Any = drawn(form, d_out, d_in)
            coded = module._operator(*module._stored())
            assert isinstance(coded, (CodedWeight, TrellisWeight))
            ours = seconds(lambda c=coded: c.dense(DTYPE), 3, 9)
            unfused = torch.empty(d_out, d_in, device=DEVICE, dtype=DTYPE)
            for start, part in coded._parts():
                unfused[start : start + len(part)] = part
            if not torch.equal(unfused, coded.dense(DTYPE)):
                raise SystemExit(f"error: {form}, {d_out} x {d_in}: both ways differ")
            figures[f"{d_out}x{d_in} {form}"] = ours / theirs
            table.add_row(
                f"{d_out} x {d_in}", form, f"{ours * 1e3:.3f}",
                f"{weight.nbytes / ours / 1e9:.0f}", f"{theirs * 1e3:.3f}", f"{ours / theirs:.2f}",
            )  # fmt: skip
    console.print(table)
    return {"decode_ratio": figures}


def fit(console: Console) -> dict[str, Any]:
    """Time of finding codes along a trellis, against the same on one core of the CPU."""
    table = Table("shape", "bits", "s", "CPU, s", "fit_ratio")
    figures: dict[str, Any] = {}
    x = torch.randn(8192, 4096, device=DEVICE)
    weight, sums = torch.randn(4096, 4096, device=DEVICE), x.T @ x
    for bits in (2, 4):
        taken: list[float] = []
        for device in (DEVICE, torch.device("cpu")):
            here, matrix = weight.to(device), sums.to(device)

            def run(here: Tensor = here, matrix: Tensor = matrix, bits: int = bits) -> object:
                return fitted_trellis(here, Moments.of_matrix("input", "", matrix, 8192), bits, 128)

            taken.append(seconds(run, 1, 1))
        ours, theirs = taken
        figures[f"4096x4096 {bits}"] = ours / theirs
        table.add_row(
            "4096 x 4096", str(bits), f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"
        )
    console.print(table)
    return {"fit_ratio": figures}


def step(
    console: Console, shapes: Sequence[str], ways: Sequence[str], length: int
) -> dict[str, Any]:
    """Steps of training with all in memory."""
    table = Table("model", "way", "weights", "peak", "s per step", "step_ratio", "peak_ratio")
    figures: dict[str, Any] = {}
    for name in shapes:
        shape, base = SHAPES[name], (0.0, 0)
        for way in ways:
            free()
            try:
                model = in_memory(shape, way)
                weights = torch.cuda.memory_allocated()
                optim, samples = optimizer(model), batches(shape, length, length)
                taken = seconds(partial(one_step, model, optim, samples))
            except torch.cuda.OutOfMemoryError:
                table.add_row(name, way, "", "more than the GPU has", "", "", "")
                model = optim = None
                continue
            peak = torch.cuda.max_memory_allocated()
            base = (taken, peak) if way == "qlora" else base
            row = {"seconds": taken, "peak_bytes": peak, "weight_bytes": weights}
            ratios = ["", ""]
            if base[1]:
                row |= {"step_ratio": taken / base[0], "peak_ratio": peak / base[1]}
                ratios = [f"{row['step_ratio']:.2f}", f"{row['peak_ratio']:.2f}"]
            figures[f"{name} {way}"] = row
            table.add_row(
                name, way, format_bytes(weights), format_bytes(peak), f"{taken:.3f}", *ratios
            )
            model = optim = None
    console.print(table)
    return {"step": figures}


def one_step(model: Any, optim: torch.optim.Optimizer, samples: Sequence[Tensor]) -> None:
    """Micro-batches one after another, and AdamW."""
    for ids in samples:
        loss_of(model, ids)[0].backward()
    optim.step()
    optim.zero_grad(set_to_none=True)


class Repeated(Checkpoint):
    """A checkpoint of a few blocks that stands for a deeper one."""

    def read(self, name: str) -> Tensor:
        """The tensor of the block that stands for this one."""
        return super().read(_stored_name(name))


def _stored_name(name: str) -> str:
    parts = name.split(".")
    if "layers" in parts:
        at = parts.index("layers") + 1
        parts[at] = str(int(parts[at]) % STORED)
    return ".".join(parts)


def written(shape: Shape, folder: Path) -> Checkpoint:
    """A checkpoint of `shape.blocks` blocks, of which `STORED` are on disk."""
    model: Any
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(shape.config(STORED), dtype=DTYPE)
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    free()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": shape.blocks}))
    few = Checkpoint.open(folder)
    names = [name for name in few.tensors if ".layers." not in name]
    for index in range(shape.blocks):
        own = f".layers.{index % STORED}."
        names += [n.replace(own, f".layers.{index}.") for n in few.tensors if own in n]
    tensors = {name: few.tensors[_stored_name(name)] for name in sorted(names)}
    return Repeated(few.name, few.path, few.config, tensors)


def copied(streamed: Any) -> int:
    """Bytes that one pass over the model copies to the GPU."""
    waiting = streamed._weights._in_memory
    parts: Iterator[Any] = (part for unit in waiting.values() for part in unit)
    return sum(
        sum(t.nbytes for t in part._tensors) if isinstance(part, CodedWeight) else part.nbytes
        for part in parts
    )


def streamed(
    console: Console, shapes: Sequence[str], tokens: Sequence[int], memory: float, length: int
) -> dict[str, Any]:
    """Steps of training with blocks in pinned memory."""
    table = Table(
        "model",
        "way",
        "tokens",
        "peak",
        "s per step",
        "tokens/s",
        "copied",
        "copies alone",
        "tokens_ratio",
    )
    figures: dict[str, Any] = {}
    whole = torch.cuda.get_device_properties(0).total_memory
    for name in shapes:
        shape = SHAPES[name]
        torch.cuda.set_per_process_memory_fraction(memory * 2**30 / whole)
        for bits in (None, 4):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                checkpoint = written(shape, folder / "model")
                started = time.perf_counter()
                made = StreamedModel(
                    family_named("llm"), checkpoint, DTYPE, "cuda", "ram", "ram", folder, bits
                )
                console.print(
                    f"{name}, {bits or 16} bits: in memory after {time.perf_counter() - started:.0f} s"
                )
                with made.on_device():
                    model = get_peft_model(made.model, lora()).train()
                optim, size = optimizer(model), copied(made)
                free()
                alone = seconds(partial(through, made), 1, 1)
                for count in tokens:
                    torch.cuda.reset_peak_memory_stats()
                    losses = [partial(loss_of, model, ids) for ids in batches(shape, count, length)]
                    taken = seconds(partial(streamed_step, made, optim, losses), 1, 3)
                    row = {"seconds": taken, "peak_bytes": torch.cuda.max_memory_allocated()}
                    row |= {
                        "copied_bytes": 2 * size,
                        "copies_alone": 2 * alone / taken,
                        "tokens_per_second": count / taken,
                    }
                    figures[f"{name} streamed {bits or 16} {count}"] = row
                    console.print(f"{name}, {bits or 16} bits, {count:,} tokens: {taken:.2f} s")
                    table.add_row(
                        name, f"streamed, {bits or 16} bits", f"{count:,}",
                        format_bytes(int(row["peak_bytes"])), f"{taken:.2f}",
                        f"{count / taken:,.0f}", format_bytes(2 * size),
                        f"{2 * alone / taken:.2f}", "",
                    )  # fmt: skip
                made = model = optim = losses = None
                free()
        torch.cuda.set_per_process_memory_fraction(1.0)
        free()
        model = in_memory(shape, "qlora")
        optim = optimizer(model)
        for count in tokens:
            taken = seconds(partial(one_step, model, optim, batches(shape, count, length)), 1, 2)
            rate = count / taken
            table.add_row(
                name, "QLoRA in memory", f"{count:,}", format_bytes(torch.cuda.max_memory_allocated()),
                f"{taken:.2f}", f"{rate:,.0f}", "", "", "",
            )  # fmt: skip
            figures[f"{name} qlora {count}"] = {
                "seconds": taken, "tokens_per_second": rate,
                "peak_bytes": torch.cuda.max_memory_allocated(),
            }  # fmt: skip
            for bits in (16, 4):
                row = figures[f"{name} streamed {bits} {count}"]
                row["tokens_ratio"] = row["tokens_per_second"] / rate
        model = optim = None
        free()
    console.print(table)
    return {"streamed": figures}


def through(made: Any) -> None:
    """All units, one after another, with reading ahead and nothing computed."""
    units = made._stream.units
    for unit, following in zip(units, [*units[1:], None]):
        with made._weights.fill(unit, following):
            pass


def streamed_step(
    made: Any, optim: torch.optim.Optimizer, losses: Sequence[Callable[[], tuple[Tensor, None]]]
) -> None:
    """Micro-batches through each block together, and AdamW."""
    made.gradients(losses)
    optim.step()
    optim.zero_grad(set_to_none=True)


def main() -> None:
    """Measure, print tables, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["decode", "fit", "step", "streamed"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["7B", "38B"])
    ways = ["qlora", "lora", "trellis4", "trellis2", "quantized2", "low_rank"]
    parser.add_argument("--ways", nargs="+", default=ways)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--memory", type=float, default=24, help="GiB")
    parser.add_argument("--length", type=int, default=MICRO, help="tokens of a sample")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: this bench needs a CUDA device, and there is none")
    console = Console(width=140)
    if options.part == "decode":
        figures = decode(console)
    elif options.part == "fit":
        figures = fit(console)
    elif options.part == "step":
        figures = step(console, options.shapes, options.ways, options.length)
    else:
        figures = streamed(console, options.shapes, options.tokens, options.memory, options.length)
    print(json.dumps({"device": torch.cuda.get_device_name(0), **figures}))


if __name__ == "__main__":
    main()
