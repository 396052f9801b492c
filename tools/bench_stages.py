"""Time and memory of compress, correct and merge at the layer shapes of Llama-2-7B.

    python tools/bench_stages.py [--blocks 4] [--folder DIR]

`--blocks 32` is the whole model, 13 GB on disk (tools/records/llama_7b.md has that run). Random
bfloat16 weights; 16 calibration chats. Stages run in processes of their own, and the page cache is
emptied of what they read before each (`posix_fadvise`), as it is on a machine that has less memory
than the model. Correct and merge are compared with reading the same files once, `cat > /dev/null`,
also from an empty cache [correct_ratio, merge_ratio]; merge writes the model too, so the time of a
plain copy with `fsync` is printed beside it. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

import emloc_llm
from emloc.artefacts.shard_writer import ShardWriter
from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
from emloc.machine.memory import format_bytes
from emloc_llm.example import write_rows

assert emloc_llm
SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096), "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008),
}  # fmt: skip


def write_base(folder: Path, blocks: int) -> Path:
    """A checkpoint of random weights, one shard per block, never whole in memory."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32,
        num_hidden_layers=blocks, vocab_size=32000, dtype=torch.bfloat16, pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    shards: list[dict[str, tuple[int, ...]]] = []
    for block in range(blocks):
        stem = f"model.layers.{block}."
        shapes: dict[str, tuple[int, ...]] = {f"{stem}{n}.weight": s for n, s in SHAPES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{stem}{norm}.weight"] = (4096,)
        shards.append(shapes)
    table = (32000, 4096)
    shards.append({"model.embed_tokens.weight": table, "model.norm.weight": (4096,)})
    shards.append({"lm_head.weight": table})
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        declared = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
        with ShardWriter(folder / file, declared) as shard:
            for name, shape in shapes.items():
                shard.write(name, _weight(shape))
                weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def _weight(shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    # Inputs of unequal importance, as trained weights have, so that spectra decay.
    scale = torch.arange(1, shape[1] + 1).pow(-0.25) * shape[1] ** -0.5 * 4
    return (torch.randn(shape) * scale).bfloat16()


def write_adapter(folder: Path, emulator: Path) -> Path:
    """A random LoRA."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(emulator)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(folder)
    return folder


def weights(*folders: Path) -> list[Path]:
    """Their safetensors files."""
    return sorted(path for folder in folders for path in folder.glob("*.safetensors"))


def forget(paths: Sequence[Path]) -> None:
    """Take files out of the page cache, when nothing else is being written any more."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cat(paths: Sequence[Path]) -> float:
    """Seconds to read files once, from an empty cache."""
    forget(paths)
    started = time.perf_counter()
    with open(os.devnull, "wb") as sink:
        subprocess.run(["cat", *map(str, paths)], check=True, stdout=sink)
    return time.perf_counter() - started


def copy(paths: Sequence[Path], folder: Path) -> float:
    """Seconds to copy files and have them on the disk."""
    forget(paths)
    folder.mkdir()
    started = time.perf_counter()
    for path in paths:
        subprocess.run(["dd", f"if={path}", f"of={folder / path.name}", "bs=4M", "conv=fsync",
                        "status=none"], check=True)  # fmt: skip
    seconds = time.perf_counter() - started
    for path in folder.iterdir():
        path.unlink()
    return seconds


def stage(name: str, output: Path, reads: Sequence[Path], **options: object) -> dict[str, float]:
    """Seconds and peak bytes of one stage, from an empty cache."""
    forget(reads)
    command = [sys.executable, "-m", "emloc", name, "--output_dir", str(output)]
    command += [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((output / "emloc.json").read_text())["measured"]


def main() -> None:
    """Run the stages, print a table, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where to put some 35 GB at 32 blocks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root = Path(temporary)
        base = write_base(root / "base", options.blocks)
        data = write_rows(root / "train.jsonl", 64, seed=0)
        emulator = root / "emulator"
        found = {
            "compress": stage(
                "compress", emulator, weights(base), model_name_or_path=base, dataset=data,
                num_calibration_samples=64, format="low_rank", keep_ratio=0.4,
            )
        }  # fmt: skip
        adapter = write_adapter(root / "adapter", emulator)
        found["correct"] = stage(
            "correct", root / "corrected", weights(base, emulator), adapter=adapter,
            emulator=emulator, limit="none",
        )  # fmt: skip
        found["merge"] = stage("merge", root / "merged", weights(base), adapter=root / "corrected")
        reads = {
            "compress": cat(weights(base)),
            "correct": cat(weights(base, emulator)),
            "merge": cat(weights(base)),
        }
        for path in weights(root / "merged"):
            path.unlink()
        copied = copy(weights(base), root / "copy")
        size = sum(path.stat().st_size for path in weights(base))
    table = Table("stage", "seconds", "reading once", "ratio", "peak memory")
    for name, measured in found.items():
        table.add_row(
            name, f"{measured['seconds']:.1f}", f"{reads[name]:.1f}",
            f"{measured['seconds'] / reads[name]:.2f}", format_bytes(measured["peak_bytes"]),
        )  # fmt: skip
    Console().print(table)
    print(f"base: {format_bytes(size)}; copying it, with fsync: {copied:.1f} s")
    figures: dict[str, object] = {
        f"{name}_ratio": found[name]["seconds"] / reads[name] for name in ("correct", "merge")
    }
    figures["merge_over_copy"] = found["merge"]["seconds"] / copied
    figures["peak_bytes"] = {name: measured["peak_bytes"] for name, measured in found.items()}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
