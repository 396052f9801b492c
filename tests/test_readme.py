"""The README is run: its two commands, its Python block, its command line, its file map."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from warm_python import run_python

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(language, containing):
    found = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    [text] = [text for text in found if containing in text]
    return text


@pytest.fixture(scope="module", params=["llm", "vlm"])
def each_example(request, tmp_path_factory):
    from emloc.extend.plugins import family_named

    folder = tmp_path_factory.mktemp(f"readme-{request.param}")
    return request.param, family_named(request.param).write_example(folder, seed=0)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    from emloc_llm.example import write_example

    return write_example(tmp_path_factory.mktemp("readme"), seed=0)


def test_the_two_commands_are_make_targets_and_ci_runs_them():
    commands = re.findall(r"^make (\w+)", block("bash", "make demo"), re.MULTILINE)
    assert commands == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{name}:" in makefile for name in commands)
    assert "make test" in (ROOT / ".ci/run").read_text()


WAYS = ("lora", "qlora", "uncorrected", "emloc")


def ways_of(family):
    """QLoRA is one of them for the families that its method takes."""
    from emloc.extend.plugins import families_for, method_named

    takes = families_for(method_named("qlora"))
    return [way for way in WAYS if way != "qlora" or family in takes]


def check_summary(folder, names=WAYS, measure="exact_match"):
    summary = json.loads((folder / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == ["base", *ways_of(summary["family"])]
    for row in rows.values():
        assert 0 <= row[measure] <= 1
        assert 0 < row["loss"] < 30
        assert row["peak_bytes"] > 10 * 2**20
    for name in names:
        assert rows[name]["seconds_per_step"] > 0
        assert rows[name]["loss"] < rows["base"]["loss"]
    held = {name: row["train_weight_bytes"] for name, row in rows.items()}
    assert held["emloc"] < 0.8 * held["lora"]
    assert held["emloc"] < 1.2 * held.get("qlora", held["lora"])
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")
    return summary, rows


ENDS = 0, 1, 28, 29
"""Blocks at the ends of SmolLM2-135M by which all 30 are stood for."""


@pytest.fixture(scope="module")
def ends_of_smollm2(tmp_path_factory):
    """Real weights and activations of the demo's model, with the blocks between the two ends left out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from emloc_llm.demo.model import smollm2

    model = AutoModelForCausalLM.from_pretrained(smollm2())
    blocks = model.model.layers
    assert len(blocks) == 30
    model.model.layers = torch.nn.ModuleList([blocks[number] for number in ENDS])
    model.config.num_hidden_layers = len(ENDS)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(ENDS)]
    folder = tmp_path_factory.mktemp("smollm2") / "ends"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2()).save_pretrained(folder)
    return folder


DEMO = """
import runpy
import sys
from importlib import import_module
from types import SimpleNamespace

from emloc.demos import comparison
from warm_python import forked_python

comparison.subprocess = SimpleNamespace(
    DEVNULL=None, run=lambda command, stdout, check: forked_python(command)
)
family, few = {family!r}, {few!r}
demo = import_module("emloc_" + family + ".demo.demo")
if family == "diffusion":
    demo.INFERENCE_STEPS = 3

class Fewer(comparison.Comparison):
    def __init__(self, **given):
        super().__init__(**{{**given, **{{name: {{**given[name], **few[name]}} for name in few}}}})

demo.Comparison = Fewer
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A command whose stages are processes of their own as ever, but need not import the libraries again."""

FEW_SAMPLES = {"num_calibration_samples": 8}
FEW = {
    "llm": {"evaluate": {"max_new_tokens": 8}},
    "vlm": {"compress": FEW_SAMPLES, "correct": FEW_SAMPLES},
    "diffusion": {
        "compress": FEW_SAMPLES,
        "correct": FEW_SAMPLES,
        "evaluate": {"num_noise_samples": 16},
    },
}
"""Less than the demos ask their stages for, of what no option of theirs says."""


def run_demo(family, command):
    run = run_python("-c", DEMO.format(family=family, few=FEW[family]), *command)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.strip().splitlines()[-1]


def demo_of(family, folder, *more):
    script = Path(sys.executable).with_name("emloc")
    return [script, "demo", "--family", family, "--output_dir", folder, *more]


@pytest.mark.long
def test_make_demo_on_a_real_model(ends_of_smollm2, tmp_path):
    """The README's first command, shortened: fewer blocks, steps and questions through every stage."""
    arguments = (
        f"--output_dir {tmp_path}/demo --model_name_or_path {ends_of_smollm2} "
        "--max_steps 2 --num_samples 3"
    )
    made = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "demo", f"VENV={sys.prefix}", f"ARGS={arguments}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()[-1]  # fmt: skip
    said = run_demo("llm", shlex.split(made))
    assert said.startswith("Next, your own model and data: emloc run")
    _, rows = check_summary(tmp_path / "demo")
    # The limit is chosen on other samples than these, so a little slack.
    assert rows["emloc"]["loss"] < 1.1 * rows["uncorrected"]["loss"]
    errors = json.loads((tmp_path / "demo/emulator/emloc.json").read_text())["layers"]
    assert len(errors) == 7 * len(ENDS)
    assert {entry["format"] for entry in errors.values()} <= {
        "trellis",
        "trellis_residual",
        "quantized",
    }
    assert all(0 <= entry["relative_error"] < 0.9 for entry in errors.values())


@pytest.mark.long
def test_the_vlm_demo_on_a_base_trained_shortly(tmp_path):
    """The same code with a base that has seen little: what it scores is not the point here."""
    from emloc_vlm.demo.base import Recipe, trained_base
    from emloc_vlm.demo.small_internvl import Shape

    shape = Shape(vision_width=48, vision_layers=2, width=64, layers=2)
    recipe = Recipe(shape, vision_steps=10, steps=20)
    arguments = ["--model_name_or_path", trained_base(recipe), "--max_steps", 6, "--num_samples", 8]
    said = run_demo("vlm", demo_of("vlm", tmp_path / "demo", *arguments))
    assert said.startswith("Next, your own model and data")
    summary, _ = check_summary(tmp_path / "demo")
    assert 0 <= summary["base_own_accuracy"] <= 1
    assert (tmp_path / "demo/samples.png").read_bytes().startswith(b"\x89PNG")
    again = trained_base(recipe)  # kept by its digest
    assert again == trained_base(recipe)


@pytest.mark.long
def test_the_diffusion_demo_on_a_base_trained_shortly(tmp_path):
    """As above; the LoRAs learn less than noise, so losses are not compared."""
    from emloc_diffusion.demo.base import Recipe, trained_base
    from emloc_diffusion.demo.small_stable_diffusion import Shape

    shape = Shape(vae_widths=(8, 8, 16), widths=(16, 24), text_width=16, text_layers=1)
    recipe = Recipe(shape, cuts=1, vae_steps=4, steps=4, batch=8)
    arguments = ["--model_name_or_path", trained_base(recipe), "--max_steps", 2, "--num_samples", 2]
    said = run_demo("diffusion", demo_of("diffusion", tmp_path / "demo", *arguments))
    assert said.startswith("Next, your own subject: emloc run")
    summary, rows = check_summary(tmp_path / "demo", names=(), measure="fidelity")
    assert summary["measure"].startswith("fidelity: ")
    assert rows["emloc"]["seconds_per_step"] > 0
    assert (tmp_path / "demo/contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "demo/corrected/pytorch_lora_weights.safetensors").is_file()


def test_the_python_block_runs(example, tmp_path):
    code = block("python", "import emloc")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    code = code.replace("Qwen/Qwen2.5-7B-Instruct", example["model_name_or_path"])
    code = code.replace("train.jsonl", example["dataset"]).replace("max_steps=300", "max_steps=1")
    code += "\nprint(type(tuned).__name__)\n"
    run = run_python("-c", code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split()[-1].startswith("PeftModel")


@pytest.mark.long
def test_the_command_line_block_runs(example, tmp_path):
    lines = block("bash", "emloc compress").strip().splitlines()
    names = [line.split()[1] for line in lines]
    assert names == [
        "plan", "compress", "train", "correct", "polish", "merge", "evaluate", "verify", "run"]  # fmt: skip
    for line in lines[:-1]:
        line = line.replace("MODEL", example["model_name_or_path"]).replace(
            "--max_steps 300", "--max_steps 1"
        )
        line = line.replace("train.jsonl", example["dataset"]).replace(
            "test.jsonl", example["dataset"]
        )
        run = run_python("-m", *line.split(), cwd=tmp_path)
        assert run.returncode == 0, run.stderr[-3000:]


def test_the_example_script_runs(each_example, tmp_path):
    name, example = each_example
    data = example["dataset"]
    script = ROOT / f"examples/{name}.py"
    run = run_python(script, example["model_name_or_path"], data, data, tmp_path, "2")
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("exact match") == 3
    assert (tmp_path / "merged/config.json").is_file()


@pytest.mark.long
def test_the_diffusion_example_runs(tmp_path):
    """Script and YAML, whose data are a folder of pictures and a prompt."""
    from emloc.extend.plugins import family_named

    example = family_named("diffusion").write_example(tmp_path / "data", seed=0)
    model, pictures, prompt = (
        example[key] for key in ("model_name_or_path", "dataset", "instance_prompt")
    )
    size = str(example["resolution"])
    script = run_python(
        ROOT / "examples/diffusion.py", model, pictures, prompt, tmp_path / "script", "2", size
    )
    assert script.returncode == 0, script.stderr[-3000:]
    assert script.stdout.count("denoising loss") == 3
    assert (tmp_path / "script/merged/unet/config.json").is_file()
    assert (tmp_path / "script/corrected/pytorch_lora_weights.safetensors").is_file()
    overrides = [
        f"model_name_or_path={model}", f"instance_data_dir={pictures}",
        f"instance_prompt={prompt}", f"resolution={size}", f"output_dir={tmp_path / 'yaml'}",
        "train.max_train_steps=1",
    ]  # fmt: skip
    run = run_python("-m", "emloc", "run", ROOT / "examples/diffusion.yaml", *overrides)
    assert run.returncode == 0, run.stderr[-3000:]
    assert set(json.loads(run.stdout)) == {"compress", "train", "correct", "merge", "evaluate"}


def test_the_example_yaml_runs(each_example, tmp_path):
    name, example = each_example
    overrides = [
        f"model_name_or_path={example['model_name_or_path']}", f"dataset={example['dataset']}",
        f"output_dir={tmp_path / 'out'}", f"evaluate.dataset={example['dataset']}",
        "max_length=96", "train.max_steps=1",
        "evaluate.num_samples=2", "evaluate.max_new_tokens=2",
    ]  # fmt: skip
    run = run_python("-m", "emloc", "run", ROOT / f"examples/{name}.yaml", *overrides)
    assert run.returncode == 0, run.stderr[-3000:]
    assert set(json.loads(run.stdout)) == {"compress", "train", "correct", "merge", "evaluate"}


def test_the_file_map_names_every_folder():
    file_map = README.split("## Where things are")[1].split("```")[1]
    listed = set(re.findall(r"(?<![\w/-])([\w-]+)/(?=\s|,)", file_map))
    core = ROOT / "packages/emloc/src/emloc"
    folders = {path.parent.name for path in core.glob("*/__init__.py")}
    assert folders <= listed
    flat = {path.name for path in core.glob("*.py")}
    assert flat == {"__init__.py", "__main__.py", "cli.py", "config.py", "errors.py", "plugin.py"}
    for folder in (
        "packages/emloc-llm",
        "packages/emloc-baselines",
        "docs",
        "tests",
        "examples",
        "tools",
    ):
        assert f"{folder}/" in file_map
        assert (ROOT / folder).is_dir()
