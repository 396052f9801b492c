"""Base, LoRA on the base, EMLoC without correction and EMLoC on DreamBooth's subjects, over seeds.

    python tools/bench_dreambooth.py --data FOLDER [--subjects dog vase] [--seeds 0 1 2] [--max_steps 200]
        [--dino NAME --clip NAME] [--base PIPELINE] [--folder DIR]

FOLDER is the DreamBooth data set (github.com/google/dreambooth, `dataset`): one folder of pictures per
subject, and `prompts_and_classes.txt`. The base is the one of `emloc demo --family diffusion`, 32 x 32
pixels, which has seen plain shapes and no photograph: so the scores say how the rows compare and nothing
about subjects. `loss` is the denoising loss on the subject's pictures under noise that training did not
see. With `--dino` and `--clip`, names or folders of encoders, the DreamBooth prompts are drawn and scored;
without, the instance prompt is drawn and scored by `colours`, which needs no download:

    mean over drawn and real pictures of sum_c min(p_c, q_c)

with p and q the shares of a drawn and a real picture's pixels in each of 4 x 4 x 4 colours. The last line is
one JSON object with, per row, mean and spread (largest minus smallest) over the seeds of each score's mean
over the subjects.
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path
from statistics import mean

import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table

from emloc.demos.comparison import Comparison
from emloc_diffusion.data.folder import is_picture
from emloc_diffusion.data.images import read_upright
from emloc_diffusion.demo.base import trained_base
from emloc_diffusion.demo.demo import GUIDANCE
from emloc_diffusion.demo.small_stable_diffusion import PIXELS
from emloc_diffusion.drawing import draw, load_pipeline, with_lora

TOKEN = "sks"
LIVE = ("cat", "dog")  # of the data set's classes, those with the prompts for live subjects
BINS = 4  # per channel
DRAWN = 8
MEASURE = (
    f"colours: mean over all pairs of {DRAWN} drawn and the real pictures ({PIXELS} x {PIXELS}) of the "
    f"intersection of their histograms of {BINS} x {BINS} x {BINS} RGB colours; 1: the same colours"
)


def classes(data: Path) -> dict[str, str]:
    """Each subject's class, out of the lines `subject_name,class` of the data set's text file."""
    lines = (data / "prompts_and_classes.txt").read_text("utf-8").splitlines()
    start = lines.index("subject_name,class")
    rows = csv.reader(line for line in lines[start + 1 : lines.index("Prompts")] if line)
    return {name: noun for name, noun in rows if (data / name).is_dir()}


def colours(picture: Image.Image) -> np.ndarray:
    """The share of its pixels in each colour, cut to the middle square."""
    square = ImageOps.fit(picture.convert("RGB"), (PIXELS, PIXELS))
    cells = np.asarray(square, dtype=np.int64).reshape(-1, 3) * BINS // 256
    counts = np.bincount(cells @ [BINS * BINS, BINS, 1], minlength=BINS**3)
    return counts / counts.sum()


def colour_fidelity(drawn: list[Image.Image], real: list[Image.Image]) -> float:
    """See `MEASURE`."""
    theirs = [colours(picture) for picture in real]
    return mean(
        float(np.minimum(ours, one).sum()) for ours in map(colours, drawn) for one in theirs
    )


def measure(
    data: Path, subject: str, noun: str, seed: int, options: argparse.Namespace, out: Path
) -> dict:
    """Scores of the rows for one subject and seed."""
    prompt = f"a {TOKEN} {noun}"
    encoders = {"dino_model": options.dino, "clip_model": options.clip}
    encoders = {name: value for name, value in encoders.items() if value}
    scored = {
        "subject_token": TOKEN, "class_name": noun,
        "subject_kind": "live" if noun in LIVE else "object",
        "num_images_per_prompt": options.num_images_per_prompt, "drawing_seed": seed,
        "num_inference_steps": options.num_inference_steps, "guidance_scale": GUIDANCE,
    }  # fmt: skip
    ways = Comparison(
        base=options.base,
        out=out,
        train_data=str(data / subject),
        test_data=str(data / subject),
        data={"instance_prompt": prompt, "resolution": PIXELS, "seed": seed},
        compress={
            "format": "low_rank", "keep_ratio": options.keep_ratio, "num_calibration_samples": 64,
        },
        train={
            "max_train_steps": options.max_steps, "train_batch_size": 5, "lora_r": 8,
            "lora_alpha": 16, "lora_conv": True, "learning_rate": 2e-3, "logging_steps": 10,
        },
        correct={"num_calibration_samples": 64},
        evaluate={
            "num_noise_samples": 128, "per_device_eval_batch_size": 32,
            **encoders, **(scored if encoders else {}),
        },
    )  # fmt: skip
    ways.make()
    scores = ways.score()
    names = [name for name in ("dino", "clip_i", "clip_t") if name in scores["base"]]
    found = {row: {key: one[key] for key in ("loss", *names)} for row, one in scores.items()}
    if encoders:
        return found
    files = [path for path in (data / subject).iterdir() if is_picture(path)]
    real = [read_upright(path) for path in files]
    pipeline = load_pipeline(Path(options.base))
    for row, adapter in ways.adapters.items():
        with with_lora(pipeline, adapter) as tuned:
            drawn = draw(
                tuned, [prompt], DRAWN, PIXELS, options.num_inference_steps, GUIDANCE, DRAWN * seed
            )
        found[row]["colours"] = colour_fidelity(drawn, real)
    return found


def main() -> None:
    """Measure all seeds and subjects, print a table, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--subjects", nargs="+", help="by default all that have a folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--keep_ratio", type=float, default=0.5)
    parser.add_argument("--dino", help="of timm or transformers, or a folder")
    parser.add_argument("--clip", help="of transformers, or a folder")
    parser.add_argument("--num_images_per_prompt", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--base", help="another pipeline of this size than the demo's")
    parser.add_argument("--folder", type=Path, help="keep the artefacts here, and go on from them")
    options = parser.parse_args()
    nouns = classes(options.data)
    subjects = options.subjects or sorted(nouns)
    options.base = options.base or str(trained_base())
    found = []  # per seed, the means over subjects
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            each = []
            for name in subjects:
                out = (options.folder or Path(temporary)) / f"{name}-{seed}"
                out.mkdir(parents=True, exist_ok=True)
                each.append(measure(options.data, name, nouns[name], seed, options, out))
            found.append(
                {
                    row: {key: mean(one[row][key] for one in each) for key in each[0][row]}
                    for row in each[0]
                }
            )
    keys = list(found[0]["base"])
    table = Table("", *(f"{key} (spread)" for key in keys))
    figures = {}
    for row in found[0]:
        figures[row] = {}
        for key in keys:
            values = [one[row][key] for one in found]
            figures[row][key] = {"mean": mean(values), "spread": max(values) - min(values)}
        table.add_row(row, *(f"{v['mean']:.4f} ({v['spread']:.4f})" for v in figures[row].values()))
    Console().print(table)
    more = (
        {"measure": MEASURE} if "colours" in keys else {"dino": options.dino, "clip": options.clip}
    )
    print(
        json.dumps(
            {"seeds": options.seeds, "subjects": subjects, "steps": options.max_steps, **more,
             "rows": figures}
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
