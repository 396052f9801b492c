"""Memory and time of compressing an InternVL, from blocks of its shape, and what the whole would take.

    python tools/bench_vlm_stages.py [--model 8B] [--vision_blocks 2] [--language_blocks 1] [--times 1]

A checkpoint of random bfloat16 weights on disk, transformers' layout, with the block shapes of
InternVL2.5-8B or 38B and fewer blocks; one 448 pixel tile per sample. Peak anonymous memory and seconds
per block of either tower are the manifest's. Memory does not depend on the number of blocks, which
`--times 4` shows by compressing a second checkpoint of four times the depth [depth_ratio]: so the peak is
that of the whole, and the projected time is blocks times seconds. `--model small` is quick.
The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText, InternVLConfig

import emloc_vlm
from emloc.artefacts.shard_writer import ShardWriter
from emloc.integrations.transformers.skeleton import no_init_weights
from emloc.machine.memory import format_bytes
from emloc_vlm.example import example_processor

assert emloc_vlm
VISION_300M = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
               "attention_bias": True}  # fmt: skip
VISION_6B = {"hidden_size": 3200, "intermediate_size": 12800, "num_attention_heads": 25,
             "use_qk_norm": True, "norm_type": "rms_norm"}  # fmt: skip
INTERNLM2_7B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
                "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
QWEN_32B = {"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648,
            "num_attention_heads": 40, "num_key_value_heads": 8}  # fmt: skip
SMALL_VISION = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
SMALL_QWEN = {"model_type": "qwen2", "hidden_size": 768, "intermediate_size": 2048,
              "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
MODELS = {
    "small": (SMALL_VISION, 8, SMALL_QWEN, 8),
    "8B": (VISION_300M, 24, INTERNLM2_7B, 32),
    "38B": (VISION_6B, 45, QWEN_32B, 64),
}


def write_base(folder: Path, model: str, vision_blocks: int, language_blocks: int) -> Path:
    """The checkpoint, tensor by tensor, never whole in memory."""
    vision, _, language, _ = MODELS[model]
    processor = example_processor(448, 256, max_patches=1)
    config = InternVLConfig(
        vision_config={**vision, "num_hidden_layers": vision_blocks, "image_size": [448, 448],
                       "patch_size": [14, 14]},
        text_config={**language, "num_hidden_layers": language_blocks,
                     "vocab_size": len(processor.tokenizer), "pad_token_id": 0},
        image_token_id=processor.image_token_id, tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    with torch.device("meta"), no_init_weights():
        shapes = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).state_dict()
    declared = {name: (torch.bfloat16, tuple(tensor.shape)) for name, tensor in shapes.items()}
    torch.manual_seed(0)
    with ShardWriter(folder / "model.safetensors", declared) as shard:
        for name, (_, shape) in declared.items():
            shard.write(name, _weight(shape))
    return folder


def _weight(shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    # Inputs of unequal importance, as trained weights have, so that spectra decay.
    fan = shape[-1]
    return (torch.randn(shape) * torch.arange(1, fan + 1).pow(-0.25) * fan**-0.5 * 4).bfloat16()


def write_data(folder: Path, count: int) -> Path:
    """Pictures of noise and a question about each."""
    rows = []
    for index in range(count):
        torch.manual_seed(index)
        pixels = torch.randint(0, 256, (448, 448, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "question": "What is it?", "answer": "noise"})
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def compress(
    root: Path, options: argparse.Namespace, vision_blocks: int, language_blocks: int
) -> dict:
    """What the manifest measured of compressing a checkpoint of that depth."""
    base = write_base(root / "base", options.model, vision_blocks, language_blocks)
    named = {
        "model_name_or_path": base, "dataset": write_data(root, options.samples),
        "num_calibration_samples": options.samples, "calibration_batch_size": 4,
        "format": "low_rank", "keep_ratio": options.keep_ratio, "output_dir": root / "emulator",
    }  # fmt: skip
    command = [sys.executable, "-m", "emloc", "compress"]
    command += [str(part) for key, value in named.items() for part in (f"--{key}", value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((root / "emulator" / "emloc.json").read_text())["measured"]


def main() -> None:
    """Write, compress, print a table, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="8B")
    parser.add_argument("--vision_blocks", type=int, default=2)
    parser.add_argument("--language_blocks", type=int, default=1)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--keep_ratio", type=float, default=0.4)
    parser.add_argument(
        "--times", type=int, default=1, help="once more with so many times the blocks"
    )
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    measured = []
    for times in sorted({1, options.times}):
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            blocks = (times * options.vision_blocks, times * options.language_blocks)
            measured.append(compress(Path(temporary), options, *blocks))
    seconds, peak = measured[0]["block_seconds"], measured[0]["peak_bytes"]
    vision = sum(seconds[: options.vision_blocks]) / options.vision_blocks
    language = sum(seconds[options.vision_blocks :]) / options.language_blocks
    _, vision_count, _, language_count = MODELS[options.model]
    hours = (vision_count * vision + language_count * language) / 3600
    table = Table("", "blocks of the model", "seconds per block")
    table.add_row("vision tower", str(vision_count), f"{vision:.1f}")
    table.add_row("language model", str(language_count), f"{language:.1f}")
    Console().print(table)
    print(f"peak {format_bytes(peak)}; the whole InternVL2.5-{options.model} "
          f"would take {hours:.2f} hours here")  # fmt: skip
    figures = {
        "model": options.model, "peak_bytes": peak, "vision_seconds": vision,
        "language_seconds": language, "projected_hours": hours,
    }  # fmt: skip
    if options.times > 1:
        deep = measured[-1]["peak_bytes"]
        figures["depth_ratio"] = deep / peak
        print(
            f"with {options.times} times the blocks {format_bytes(deep)}, {deep / peak:.3f} times"
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
