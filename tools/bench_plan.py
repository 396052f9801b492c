"""What `emloc plan` says against what the stages then take, what is published, and what the paper reports.

    python tools/bench_plan.py [--parts stages parameters paper] [--configs FOLDER] [--only WORD]

`stages`: random models of the three families, stored in bfloat16, run through the real stages in processes
of their own, on the CPU, in float32. Each setting is planned from its options and measured twice. *Counted*:
all tensors alive at once while the Trainer runs, or while compress or correct do, to the byte
(`emloc.planning.live`), against the plan without its line of slack [worst_counted]. *Process*: the peak that
the stage's manifest names, against the whole plan [worst_process]. Samples are what a plan takes them for: as
long as `max_length` allows, not all of one length, and with a loss on all tokens.

`parameters`: of a folder of configs, against published numbers [wrong_parameters]; and how long the command
takes for the largest of them, over importing torch and transformers [plan_over_imports].

`paper`: the rows of the paper's tables (arXiv 2506.12015) that such a folder allows, beside plans that
assume one thing after another of what was counted.

Worst first. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.machine.memory import format_bytes

STEPS = {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-4}
"""Two steps: in the second, the optimiser's state is there."""

BATCH = 2
LOW_RANK = {"format": "low_rank"}
"""The paper's form, whose bytes a plan knows exactly."""

STREAMED = {"compress": (8, 8), "correct": (4, 2)}
"""Samples and samples per micro-batch; correct runs each five times."""


# -- models and data --------------------------------------------------------------------------------------


def write_llm(folder: Path) -> None:
    """Llama: 6 blocks of width 1024, and as many tokens as Llama 2 knows."""
    from emloc_llm.example import write_model

    write_model(
        folder, dtype=torch.bfloat16, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6,
        head_dim=64, num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=2048,
        vocab_size=32000,
    )  # fmt: skip


def write_vlm(folder: Path) -> None:
    """InternVL: a tower of 6 blocks of width 512 on tiles of 224 pixels, Qwen2 with 6 of width 1024."""
    from transformers import AutoModelForImageTextToText, InternVLConfig

    from emloc.integrations.transformers.lively_model import lively_model
    from emloc_vlm.example import example_processor

    processor = example_processor(224, 64, max_patches=3)
    config = InternVLConfig(
        vision_config={"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
                       "num_hidden_layers": 6, "image_size": [224, 224], "patch_size": [14, 14],
                       "attention_bias": True},
        text_config={"model_type": "qwen2", "hidden_size": 1024, "intermediate_size": 2816,
                     "num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 6,
                     "vocab_size": 32000, "pad_token_id": processor.tokenizer.pad_token_id},
        image_token_id=processor.image_token_id, image_seq_length=64, tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
    )  # fmt: skip
    lively_model(AutoModelForImageTextToText, config, 0).bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)


def write_unet(folder: Path) -> None:
    """Stable Diffusion's kind: two levels, of 256 and 512 channels."""
    from emloc_diffusion.example_pipelines import write_pipeline

    write_pipeline(
        folder, "sd", dtype=torch.bfloat16, block_out_channels=(256, 512), layers_per_block=2,
        norm_num_groups=32, cross_attention_dim=256, attention_head_dim=8,
    )  # fmt: skip


def write_flux(folder: Path) -> None:
    """FLUX's kind: 3 double and 6 single blocks of width 768."""
    from emloc_diffusion.example_pipelines import write_pipeline

    write_pipeline(
        folder, "flux", dtype=torch.bfloat16, num_layers=3, num_single_layers=6, attention_head_dim=64,
        num_attention_heads=12, joint_attention_dim=256, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip


def write_texts(folder: Path, size: int, count: int) -> Path:
    """Texts of `size` tokens and less, the one that ends a text included."""
    path = folder / f"{count}-{size}.jsonl"
    texts = ["".join(chr(97 + (i * 7 + j) % 26) for j in range(size - 1 - i)) for i in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_questions(folder: Path, size: int, count: int) -> Path:
    """A picture of three tiles and a thumbnail each; every other sample is cut at `size` tokens."""
    from PIL import Image

    path = folder / f"{count}-{size}.jsonl"
    rows: list[dict[str, str]] = []
    for index in range(count):
        torch.manual_seed(index)
        pixels = torch.randint(0, 256, (224, 672, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
        answer = "noise " * ((size if index % 2 == 0 else size - 320) // 6)
        rows.append({"image": f"{index}.png", "question": "What is it?", "answer": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_photographs(folder: Path, _: int, count: int) -> Path:
    """Pictures of squares."""
    from emloc_diffusion.example import write_pictures

    return write_pictures(folder / f"{count}-pictures", count, seed=0)


@dataclass(frozen=True)
class Model:
    """A model of one family, its data, and the option that says how large a sample is."""

    write: Callable[[Path], None]
    data: Callable[[Path, int, int], Path]
    size_option: str
    sizes: tuple[int, int]
    more: Mapping[str, Any]


MODELS = {
    "llama": Model(write_llm, write_texts, "max_length", (384, 768), {}),
    "internvl": Model(write_vlm, write_questions, "max_length", (384, 768),
                      {"max_dynamic_patch": 3, "completion_only_loss": False}),
    "unet": Model(write_unet, write_photographs, "resolution", (256, 384),
                  {"instance_prompt": "a photo of sks square"}),
    "flux": Model(write_flux, write_photographs, "resolution", (256, 384),
                  {"instance_prompt": "a photo of sks square"}),
}  # fmt: skip

# -- settings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One stage under some options.

    Attributes:
        stage: compress, train or correct.
        large: whether samples are of the larger size.
        twice: gradient checkpointing.
        on: what is trained, base or emulator.
    """

    model: str
    stage: str
    large: bool = True
    twice: bool = False
    on: str = "emulator"

    @property
    def size(self) -> int:
        """Tokens or pixels."""
        return MODELS[self.model].sizes[self.large]

    def options(self, data: Callable[[int, int], Path]) -> dict[str, Any]:
        """Of the stage and of its plan alike."""
        model = MODELS[self.model]
        shared = {model.size_option: self.size, **model.more}
        if self.stage == "train":
            batch = {"per_device_train_batch_size": BATCH, "gradient_checkpointing": self.twice}
            return {"dataset": str(data(self.size, BATCH)), **batch, **shared}
        samples, batch = STREAMED[self.stage]
        calibration = {"num_calibration_samples": samples, "calibration_batch_size": batch}
        return {"dataset": str(data(self.size, samples)), **calibration, **shared}


def settings() -> list[Setting]:
    """Of each model, each pair of values of size, checkpointing and base; and what streams."""
    found: list[Setting] = []
    for model in MODELS:
        found.append(Setting(model, "compress"))
        for large, twice, on in ((False, False, "base"), (True, True, "base"),
                                 (True, False, "emulator"), (False, True, "emulator")):  # fmt: skip
            found.append(Setting(model, "train", large, twice, on))
        found.append(Setting(model, "correct"))
    return found


def planned(setting: Setting, base: Path, options: Mapping[str, Any]) -> Mapping[str, int]:
    """The plan's lines."""
    dtype = "float32" if setting.stage == "train" else "bfloat16"
    plan = emloc.plan(
        model_name_or_path=str(base), device="cpu", dtype=dtype, **LOW_RANK, **options
    )
    row = (
        plan["beside"]["LoRA on the base"]
        if setting.on == "base"
        else plan["stages"][setting.stage]
    )
    return row["device_bytes"]["lines"]


def run_stage(setting: Setting, root: Path, options: Mapping[str, Any], output: Path) -> int:
    """The peak that the manifest names."""
    subprocess.run(
        command(setting.stage, stage_options(setting, root, options, output)),
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return int(json.loads((output / "emloc.json").read_text())["measured"]["peak_bytes"])


def stage_options(
    setting: Setting, root: Path, options: Mapping[str, Any], output: Path
) -> dict[str, Any]:
    """With the folders that the stage reads and writes."""
    base, emulator = str(root / "base"), str(root / "emulator")
    reads = {
        "compress": {"model_name_or_path": base, **LOW_RANK},
        "train": {"emulator": emulator} if setting.on == "emulator" else {"model_name_or_path": base},
        "correct": {"emulator": emulator, "adapter": str(root / "adapter")},
    }  # fmt: skip
    steps = {**STEPS, "dtype": "float32"} if setting.stage == "train" else {}
    return {**options, **reads[setting.stage], **steps, "output_dir": str(output)}


def command(stage: str, options: Mapping[str, Any]) -> list[str]:
    """As on the command line."""
    made = [sys.executable, "-m", "emloc", stage]
    for name, value in options.items():
        if isinstance(value, bool):
            made.append(f"--{name}" if value else f"--no_{name}")
        else:
            made += [f"--{name}", str(value)]
    return made


def count(stage: str, options: Mapping[str, Any]) -> None:
    """Run a stage with every tensor counted; prints the most that was alive at once.

    Of train, while the Trainer runs; its model was loaded by then.
    """
    import transformers
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._python_dispatch import _disable_current_modes

    from emloc.planning.live import LiveBytes

    class Real(LiveBytes):
        """Without what is computed on fake tensors to find out which layers share an input."""

        def _count(self, tensor: Any, kind: str) -> Any:
            return None if isinstance(tensor, FakeTensor) else super()._count(tensor, kind)

    live = Real()
    train, read = transformers.Trainer.train, Checkpoint.read

    def mapped(checkpoint: Checkpoint, name: str) -> Any:
        with _disable_current_modes():
            tensor = read(checkpoint, name)
        live.ignore(tensor)
        return tensor

    def counted(trainer: Any, *given: Any, **named: Any) -> Any:
        live.mark([*trainer.model.parameters(), *trainer.model.buffers()], "model")
        with live:
            return train(trainer, *given, **named)

    transformers.Trainer.train, Checkpoint.read = counted, mapped
    with contextlib.nullcontext() if stage == "train" else live:
        getattr(emloc, stage)(**options)
    print(json.dumps({"peak": live.peak.total, "kinds": live.peak.kinds}))


def count_stage(setting: Setting, root: Path, options: Mapping[str, Any], output: Path) -> int:
    """`count` in a process of its own."""
    given = json.dumps(stage_options(setting, root, options, output))
    command = [sys.executable, __file__, "--count", setting.stage, given]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def measure(setting: Setting, root: Path, verbose: bool) -> dict[str, Any]:
    """One row."""
    started = time.perf_counter()
    model = MODELS[setting.model]
    options = setting.options(lambda size, count: model.data(root, size, count))
    lines = planned(setting, root / "base", options)
    first = {"compress": "emulator", "train": "adapter", "correct": "corrected"}[setting.stage]
    output = root / first
    if output.exists():
        output = root / f"{first}-{len(list(root.iterdir()))}"
    if setting.on == "base":
        output = root / f"on-base-{len(list(root.iterdir()))}"
    total = sum(lines.values())
    row: dict[str, Any] = {
        "model": setting.model, "stage": setting.stage, "on": setting.on, "size": setting.size,
        "checkpointing": setting.twice, "planned": total,
        "process": run_stage(setting, root, options, output),
    }  # fmt: skip
    row["process_error"] = total / row["process"] - 1
    row["counted"] = count_stage(setting, root, options, Path(f"{output}-counted"))
    row["counted_error"] = (total - lines["allocator slack"]) / row["counted"] - 1
    row["seconds"] = round(time.perf_counter() - started, 1)
    if verbose:
        print(json.dumps({**row, "lines": lines}), file=sys.stderr)
    return row


def bench_stages(only: str, verbose: bool) -> dict[str, Any]:
    """All settings, worst first."""
    rows: list[dict[str, Any]] = []
    for name, model in MODELS.items():
        if only and only not in name:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            torch.manual_seed(0)
            model.write(root / "base")
            # The adapter that correct reads is the first that is trained on the emulator.
            rows += [measure(s, root, verbose) for s in settings() if s.model == name]
    show(rows)
    return {
        "settings": len(rows),
        "worst_process": max(abs(row["process_error"]) for row in rows),
        "worst_counted": max(abs(row["counted_error"]) for row in rows),
        "rows": rows,
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """As a table."""
    table = Table("model", "stage", "on", "size", "twice", "planned", "process", "error",
                  "counted", "error", "s")  # fmt: skip
    for row in sorted(rows, key=lambda row: -abs(row["process_error"])):
        table.add_row(
            row["model"], row["stage"], row["on"] if row["stage"] == "train" else "",
            str(row["size"]), "yes" if row["checkpointing"] else "", format_bytes(row["planned"]),
            format_bytes(row["process"]), f"{row['process_error']:+.1%}",
            format_bytes(row["counted"]), f"{row['counted_error']:+.1%}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=130).print(table)


# -- configs ----------------------------------------------------------------------------------------------

PUBLISHED = {
    "InternVL2_5-2B": "2.2", "InternVL2_5-8B": "8.08", "InternVL2_5-26B": "25.5",
    "InternVL2_5-38B": "38.4", "InternVL2_5-38B-hf": "38.4", "Llama-2-7b-hf": "6.74",
    "Llama-2-13b-hf": "13.02", "Llama-2-70b-hf": "68.98", "Llama-3.1-8B": "8.03",
    "Qwen2.5-7B": "7.62", "Qwen2.5-32B": "32.76", "stable-diffusion-v1-5": "0.86",
    "stable-diffusion-xl-base-1.0": "2.57", "FLUX.1-dev": "11.9",
}  # fmt: skip
"""10⁹ parameters by folder, as model cards and papers print them; of pipelines, the denoiser's."""


def bench_parameters(configs: Path) -> dict[str, Any]:
    """Counts that, rounded as the published ones are, should be the same."""
    table, wrong = Table("model", "parameters", "10⁹", "published"), list[str]()
    for name, published in PUBLISHED.items():
        count = emloc.plan(model_name_or_path=str(configs / name))["parameters"]
        digits = len(published.partition(".")[2])
        rounded = f"{count / 1e9:.{digits}f}"
        if rounded != published:
            wrong.append(name)
        table.add_row(name, f"{count:,}", rounded, published)
    Console().print(table)
    plan = [sys.executable, "-m", "emloc", "plan", str(configs / "Llama-2-70b-hf"), "--json"]
    imports = [sys.executable, "-c", "import torch, transformers"]
    planned, imported = (min(seconds(made) for _ in range(2)) for made in (plan, imports))
    print(f"emloc plan of Llama-2-70b-hf: {planned:.1f} s of processor time; importing torch and "
          f"transformers: {imported:.1f} s; {planned / imported:.2f} times")  # fmt: skip
    return {"wrong_parameters": wrong, "plan_over_imports": planned / imported,
            "plan_seconds": planned}  # fmt: skip


TIMES = ("children_user", "children_system")


def seconds(made: Sequence[str]) -> float:
    """Processor time that a command takes, which others on the machine do not lengthen by waiting."""
    before = os.times()
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    user, system = (getattr(after, n) - getattr(before, n) for n in TIMES)
    return user + system


VLM = {**LOW_RANK, "lora_r": 8, "per_device_train_batch_size": 1, "max_length": 2048}
FLUX = {**LOW_RANK, "lora_r": 16, "per_device_train_batch_size": 1, "resolution": 512}
TWICE = {"gradient_checkpointing": True}
ATTENTION = {"lora_target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
MODULATION = {"include": [r".*norm.*\.linear", "norm_out.linear", "time_text_embed.*"]}


@dataclass(frozen=True)
class Reported:
    """A row of the paper, in 10⁹ bytes as it prints them, and assumptions that it may stand on."""

    name: str
    folder: str
    base: float | None
    light: float | None
    assumptions: Mapping[str, Mapping[str, Any]]


REPORTED = (
    Reported("InternVL2.5-8B, keep 0.4", "InternVL2_5-8B", 22.3, 11.5, {
        "our defaults: no checkpointing": {**VLM, "keep_ratio": 0.4},
        "checkpointing": {**VLM, **TWICE, "keep_ratio": 0.4},
        "checkpointing, 3072 tokens": {**VLM, **TWICE, "keep_ratio": 0.4, "max_length": 3072},
        "checkpointing, the tower dense": {
            **VLM, **TWICE, "keep_ratio": 0.4, "exclude": [r"vision_tower\..*"]},
        "no checkpointing, 512 tokens": {**VLM, "keep_ratio": 0.4, "max_length": 512},
    }),
    Reported("InternVL2.5-38B in 24 GB", "InternVL2_5-38B", 95.0, 24.0, {
        "no checkpointing, keep 0.25": {**VLM, "keep_ratio": 0.25},
        "checkpointing, keep 0.25": {**VLM, **TWICE, "keep_ratio": 0.25},
        "checkpointing, keep 0.2": {**VLM, **TWICE, "keep_ratio": 0.2},
        "checkpointing, keep 0.15": {**VLM, **TWICE, "keep_ratio": 0.15},
        "checkpointing, keep 0.2, 4096 tokens": {
            **VLM, **TWICE, "keep_ratio": 0.2, "max_length": 4096},
        "checkpointing, keep 0.2, 1024 tokens": {
            **VLM, **TWICE, "keep_ratio": 0.2, "max_length": 1024},
    }),
    Reported("FLUX DreamBooth, keep 0.45", "FLUX.1-dev", 35.1, 22.9, {
        "our defaults: LoRA on all linear layers": {**FLUX, "keep_ratio": 0.45},
        "LoRA on attention (diffusers' default)": {**FLUX, **ATTENTION, "keep_ratio": 0.45},
        "the same, modulation compressed too": {
            **FLUX, **ATTENTION, **MODULATION, "keep_ratio": 0.45},
        "the same, checkpointing": {**FLUX, **ATTENTION, **TWICE, "keep_ratio": 0.45},
    }),
)  # fmt: skip

OURS = ("allocator slack", "CUDA context")
"""What torch's own counter of allocated bytes leaves out."""


def bench_paper(configs: Path) -> dict[str, Any]:
    """Plans beside what the paper reports, in GB."""
    table = Table("row", "assumption", "paper: LoRA", "plan", "allocated", "paper: EMLoC", "plan",
                  "allocated", "weights")  # fmt: skip
    found: dict[str, Any] = {}
    for row in REPORTED:
        for number, (assumption, options) in enumerate(row.assumptions.items()):
            plan = emloc.plan(model_name_or_path=str(configs / row.folder), **options)
            base = plan["beside"]["LoRA on the base"]["device_bytes"]
            light = plan["stages"]["train"]["device_bytes"]
            pairs = [(part["total"], allocated(part["lines"])) for part in (base, light)]
            (of_base, base_allocated), (of_light, light_allocated) = pairs
            table.add_row(
                row.name if number == 0 else "", assumption, f"{row.base}" if number == 0 else "",
                f"{of_base / 1e9:.1f}", f"{base_allocated / 1e9:.1f}",
                f"{row.light}" if number == 0 else "", f"{of_light / 1e9:.1f}",
                f"{light_allocated / 1e9:.1f}",
                f"{light['lines']['weights'] / 1e9:.1f}" if "weights" in light["lines"]
                else "encoding",
            )  # fmt: skip
            lines = {"base": base["lines"], "emulator": light["lines"]}
            found[f"{row.name}; {assumption}"] = lines
        table.add_section()
    Console(width=150).print(table)
    name = str(configs / "InternVL2_5-38B")
    fitted = emloc.plan(model_name_or_path=name, memory="24GiB", lora_r=8)
    chosen = {key: fitted[key] for key in ("fits", "keep_ratio", "given_up", "smallest")}
    print(f"InternVL2.5-38B in 24 GiB by the planner: {json.dumps(chosen)}")
    return {"paper": found, "in_24_gib": chosen}


def allocated(lines: Mapping[str, int]) -> int:
    """Bytes of tensors."""
    return sum(count for name, count in lines.items() if name not in OURS)


def main() -> None:
    """Run the parts, print their tables, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["stages", "parameters", "paper"])
    parser.add_argument("--configs", type=Path, help="folder of model folders with their configs")
    parser.add_argument("--only", default="", help="models whose name has this in it")
    parser.add_argument("--verbose", action="store_true", help="each row with the plan's lines")
    parser.add_argument("--count", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        stage, given = options.count
        count(stage, json.loads(given))
        return
    figures: dict[str, Any] = {}
    if "stages" in options.parts:
        figures |= bench_stages(options.only, options.verbose)
    if options.configs and "parameters" in options.parts:
        figures |= bench_parameters(options.configs)
    if options.configs and "paper" in options.parts:
        figures |= bench_paper(options.configs)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
