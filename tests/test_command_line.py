"""The commands as a user types them: results, refusals, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from warm_python import run_python

from emloc.demos.comparison import run_stage
from emloc.errors import EmlocError


def emloc_command(*arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "emloc", *map(str, arguments)],
        capture_output=True, text=True, check=False, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    from emloc_llm.example import write_example

    return write_example(tmp_path_factory.mktemp("llm"), seed=0)


def warm_command(*arguments, **more):
    return run_python("-m", "emloc", *arguments, **more)


def test_help_lists_every_stage():
    shown = emloc_command("--help").stdout
    for name in ("compress", "train", "correct", "merge", "evaluate", "verify", "run", "families",
                 "demo"):  # fmt: skip
        assert f"  {name} " in shown
    options = warm_command("train", "--help").stdout
    for name in ("emulator", "lora_target_modules", "use_rslora", "resume_from_checkpoint",
                 "gradient_accumulation_steps", "report_to", "warmup_ratio"):  # fmt: skip
        assert f"--{name}" in options


def test_families():
    assert "llm" in warm_command("families").stdout


def test_methods():
    shown = warm_command("methods").stdout
    for name in ("emloc", "emloc-uncorrected", "lora", "offsite-tuning"):
        assert f" {name} " in shown
    assert "bench" in warm_command("--help").stdout


REFUSALS = [
    (("compress", "--output_dir", "x", "--model_name_or_path", "m", "--keep_ration", "1"), 2,
     "keep_ratio"),
    (("compress", "--output_dir", "x", "--model_name_or_path", "m", "--keep_ratio", "2"), 2,
     "less than or equal to 1"),
    (("compress", "--output_dir", "x"), 2, "model_name_or_path"),
    (("compress", "--output_dir", "x", "--model_name_or_path", "/no/where"), 4, "No folder"),
    (("verify", "--path", "/no/where"), 4, "No folder"),
    (("demo", "--family", "audio"), 8, "pip install emloc-audio"),
    (("run", "/no/where.yaml"), 2, "No file"),
    (("run", "c.yaml", "--keep_ratio", "0.3"), 2, "options are given as keep_ratio=VALUE"),
    (("compress", "--output_dir", "x", "--lora_r", "1"), 2, "lora_r. It is one of plan and train."),
    (("train", "--output_dir", "", "--dataset", "d"), 2, "output_dir = '': it is empty"),
    (("demo", "--device", "cude"), 2, "Did you mean cuda?"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "message"), REFUSALS)
def test_refusals_are_one_sentence_and_a_code_of_their_kind(arguments, code, message, tmp_path):
    run = warm_command(*arguments, cwd=tmp_path)
    assert run.returncode == code
    assert message in run.stderr
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_run_a_yaml_file_twice_with_overrides(llm, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model_name_or_path: {llm['model_name_or_path']}\n"
        f"dataset: {llm['dataset']}\n"
        f"output_dir: {tmp_path / 'out'}\nmax_length: 96\n"
        "compress: {keep_ratio: 0.5}\n"
        "train: {max_steps: 50, lora_r: 2}\n"
        "correct: {limit: 1}\nmerge:\nevaluate: {num_samples: 2, max_new_tokens: 2}\n"
    )
    first = warm_command("run", config, "train.max_steps=2", "seed=3")
    assert first.returncode == 0, first.stderr
    results = json.loads(first.stdout)
    assert results["evaluate"]["samples"] == 2
    assert results["merge"] == str(tmp_path / "out" / "merged")
    manifest = json.loads((tmp_path / "out/adapter/emloc.json").read_text())
    assert (manifest["settings"]["max_steps"], manifest["settings"]["seed"]) == (2, 3)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = warm_command("run", config, "train.max_steps=2", "seed=3")
    assert json.loads(again.stdout) == results
    assert again.stderr.count("complete already") == 5
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    other = warm_command("run", config, "train.max_steps=3", "seed=3")
    assert other.returncode == 7
    assert "nothing is ever overwritten" in other.stderr


def test_flags_take_true_and_false_as_well(llm, tmp_path):
    refused = ("--gradient_checkpointing", "true", "--stream")
    options = ("--model_name_or_path", llm["model_name_or_path"], "--dataset", llm["dataset"])
    said = warm_command(
        "train", *map(str, options), "--output_dir", str(tmp_path / "a"), *refused, "TRUE"
    )
    assert "stream=true excludes gradient_checkpointing" in said.stderr
    said = warm_command(
        "train",
        *map(str, options),
        "--output_dir",
        str(tmp_path / "a"),
        *refused,
        "false",
        "--max_steps",
        "0",
    )
    assert "max_steps = 0 would learn nothing" in said.stderr
    assert not (tmp_path / "a").exists()


def test_a_log_gets_lines_and_no_control_characters(llm, tmp_path):
    """As nohup, CI and SLURM keep it: nothing is a terminal."""
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model_name_or_path: {llm['model_name_or_path']}\ndataset: {llm['dataset']}\n"
        f"output_dir: {tmp_path / 'out'}\nmax_length: 96\ncompress: {{}}\n"
        "train: {max_steps: 4, logging_steps: 1}\ncorrect: {limit: 1}\nmerge:\n"
        "evaluate: {num_samples: 2, max_new_tokens: 1}\n"
    )
    done = warm_command("run", config)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert all(character.isprintable() or character == "\n" for character in text)
    for name in ("compress", "train", "correct", "merge", "loss", "answers"):
        lines = [line for line in text.splitlines() if line.startswith(f"{name}: ")]
        assert any("(0%)" in line for line in lines)
        assert any("(100%)" in line for line in lines)
    assert "train: 4/4 (100%)" in text
    assert ", loss " in text


def test_a_demo_stops_where_one_of_its_stages_does(tmp_path, capfd):
    with pytest.raises(EmlocError, match="It stopped in emloc compress; the reason") as stopped:
        run_stage("compress", tmp_path / "x", model_name_or_path="/no/where", resume=True)
    assert stopped.value.exit_code == 2
    assert "no option" in capfd.readouterr().err.lower()


def test_ctrl_c_is_one_sentence(llm, tmp_path):
    arguments = ["train", "--model_name_or_path", llm["model_name_or_path"], "--dataset",
                 llm["dataset"], "--output_dir", tmp_path / "a", "--max_steps", "100000"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "emloc", *map(str, arguments)],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        # A shell ignores the signal for what it runs in the background, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        log = tmp_path / "a.partial/trainer_log.jsonl"
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.strip().endswith("the same command continues where it can.")
    assert "Traceback" not in errors
    assert not (tmp_path / "a").exists()


def test_a_broken_plugin_is_named_and_help_still_works(tmp_path):
    """A real distribution on the path whose plugin module cannot be imported."""
    info = tmp_path / "emloc_broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: emloc-broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[emloc]\nbroken = emloc_broken_hooks\n")
    (tmp_path / "emloc_broken_hooks.py").write_text("import a_module_that_is_not_there\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    shown = emloc_command("families", env=environment)
    assert shown.returncode == 0
    assert "llm" in shown.stdout
    assert "plugin broken is broken" in shown.stderr
    assert "a_module_that_is_not_there" in shown.stderr
    assert emloc_command("--help", env=environment).returncode == 0


def test_plugins_add_commands_and_one_that_fails_is_left_out(tmp_path):
    source = """
import emloc
@emloc.hookimpl
def emloc_register_commands(app):
    {body}
"""
    bodies = {"good": "app.command('greet')(lambda: print('hello'))", "bad": "raise KeyError('x')"}
    for name, body in bodies.items():
        info = tmp_path / f"emloc_{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: emloc-{name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[emloc]\n{name} = emloc_{name}_hooks\n")
        (tmp_path / f"emloc_{name}_hooks.py").write_text(source.format(body=body))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert emloc_command("greet", env=environment).stdout.strip() == "hello"
    assert "plugin bad is broken" in emloc_command("families", env=environment).stderr
