"""The bench: what is shared, what is skipped, what a killed run leaves, and what its tables say."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from reproduce_tools import load
from warm_python import run_python

import emloc
from emloc.artefacts.output_lock import output_lock
from emloc.errors import ConfigError, DataError, EmlocError, NumericalError, OutputError
from emloc.extend.plugins import family_named
from emloc_baselines.bench import cell as cell_module
from emloc_baselines.bench.cells import files_named, measured_cells, method_cell, prepare_data
from emloc_baselines.bench.config import read_config
from emloc_baselines.bench.harness import run_bench
from emloc_baselines.bench.split import split_rows
from emloc_baselines.bench.tables import gains_recovered


@pytest.fixture(scope="module")
def options(tiny):
    """Two budgets, two learning rates, one seed, three rows."""
    return {
        "model_name_or_path": str(tiny.base),
        "seeds": [0],
        "keep_ratio": [0.4, 0.7],
        "max_length": 96,
        "validation_samples": 8,
        "compress": {"format": "low_rank", "num_calibration_samples": 8},
        "train": {"max_steps": 3, "lora_r": 2, "learning_rate": [1e-4, 1e-2],
                  "per_device_train_batch_size": 4},
        "correct": {"num_calibration_samples": 8},
        "evaluate": {"max_new_tokens": 2},
        "datasets": {
            "words": {"dataset": str(tiny.data), "evaluate": {"dataset": str(tiny.test)}}
        },
        "methods": ["lora", "emloc", "emloc-uncorrected"],
    }  # fmt: skip


class Counting:
    """Runs cells in this process and says which stages were run."""

    def __init__(self, monkeypatch, only=None):
        self.cells, self.stages, self.only = [], [], only
        for name in ("compress", "train", "correct", "polish"):
            stage = getattr(emloc, name)
            monkeypatch.setattr(stage, "function", self._counted(name, stage.function))

    def _counted(self, name, function):
        def call(config):
            self.stages.append(name)
            return function(config)

        return call

    def __call__(self, cell, root):
        if self.only is not None and len(self.cells) == self.only:
            raise KeyboardInterrupt
        self.cells.append(cell.title)
        cell_module.run_cell(cell, root)


@pytest.fixture
def run(monkeypatch):
    with monkeypatch.context() as patch:
        yield Counting(patch)


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """One finished bench, run in this process, and what it ran."""
    out = tmp_path_factory.mktemp("bench") / "out"
    with pytest.MonkeyPatch.context() as patch:
        counting = Counting(patch)
        run_bench({**options, "output_dir": str(out)}, run=counting)
    return out, counting


def records(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_cell_is_there_once_and_work_is_shared(whole):
    out, counting = whole
    found = [(r["label"], r["keep_ratio"]) for r in records(out)]
    assert found == [
        ("base", None), ("lora", None), ("emloc", 0.4), ("emloc-uncorrected", 0.4),
        ("emloc", 0.7), ("emloc-uncorrected", 0.7),
    ]  # fmt: skip
    # Per budget one emulator; per budget and learning rate one LoRA for both rows of EMLoC; the LoRA on
    # the base is one for all budgets. The first budget is run at both learning rates, the second at
    # the chosen ones.
    assert counting.stages.count("compress") == 2
    chosen = {r["label"]: r["learning_rate"] for r in records(out) if r["method"]}
    second_budget = len({chosen["emloc"], chosen["emloc-uncorrected"]})
    assert counting.stages.count("train") == 2 + 2 + second_budget


def test_rows_that_another_bench_chose_on_are_kept_from_training_where_that_is_asked_for(
    options, tmp_path
):
    def training_rows(**changed):
        config = read_config({**options, "output_dir": str(tmp_path), **changed})
        path = prepare_data(config, "words").training.get("dataset")
        return path and Path(path).read_text()

    one_rate = {**options["train"], "learning_rate": 1e-2}
    chosen_on = training_rows()
    assert training_rows(train=one_rate) == chosen_on
    without = {name: value for name, value in options.items() if name != "validation_samples"}
    config = read_config({**without, "output_dir": str(tmp_path), "train": one_rate})
    assert not prepare_data(config, "words").training, "nothing is chosen, so nothing is kept"


def test_a_record_says_what_went_in_and_what_it_took(whole, tiny):
    [record] = [r for r in records(whole[0]) if (r["label"], r["keep_ratio"]) == ("emloc", 0.4)]
    [lora] = [r for r in records(whole[0]) if r["label"] == "lora"]
    assert 0 < record["held_bytes"] < lora["held_bytes"]
    assert lora["held_bytes"] == sum(
        f.stat().st_size for f in tiny.base.glob("*.safetensors")
    ) - 8 - header_bytes(tiny.base / "model.safetensors")  # fmt: skip
    assert set(record["seconds"]) == {"build", "train", "recover"}
    assert record["overhead_seconds"] == pytest.approx(
        record["seconds"]["build"] + record["seconds"]["recover"]
    )
    assert set(record["peak_bytes"]) == {"build", "train", "recover", "evaluate"}
    assert record["recovery"]["limit"] in record["recovery"]["calibration_loss"]
    assert record["inputs"]["train"]["max_steps"] == 3
    assert str(tiny.root) not in json.dumps(record["inputs"]), "content counts, not where it lies"
    assert len(record["digest"]) == 64
    assert 0 <= record["score"] <= 1


def header_bytes(path):
    return int.from_bytes(path.read_bytes()[:8], "little")


def test_loss_is_what_evaluate_finds(whole, options, tiny):
    found = emloc.evaluate(
        model_name_or_path=str(tiny.base), dataset=str(tiny.test), max_length=96, max_new_tokens=0
    )
    [base] = [r for r in records(whole[0]) if r["label"] == "base"]
    assert base["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_the_learning_rate_is_the_best_on_validation_rows_which_are_not_trained_on(whole, tiny):
    out, _ = whole
    chosen = json.loads((out / "learning_rates.json").read_text())["words"]
    for record in records(out):
        if record["method"] is None:
            continue
        losses = chosen[record["label"]]
        assert set(losses) == {"0.0001", "0.01"}
        assert f"{record['learning_rate']:g}" == min(losses, key=losses.get)
        assert record["learning_rate_losses"] == losses
    [train] = (out / "data").glob("*-train.jsonl")
    [held_out] = (out / "data").glob("*-validation.jsonl")
    both = train.read_text().splitlines() + held_out.read_text().splitlines()
    assert sorted(both) == sorted(tiny.data.read_text().splitlines())
    assert len(held_out.read_text().splitlines()) == 8


def test_light_models_are_gone_and_what_they_were_is_kept(whole):
    out, _ = whole
    assert not [path for path in (out / "artefacts").glob("light-*") if path.is_dir()]
    assert all(r["light"]["emulator_bytes"] > 0 for r in records(out) if "emloc" in r["label"])


def test_a_finished_bench_runs_nothing(whole, options, run):
    out, _ = whole
    before = (out / "results.jsonl").read_bytes()
    run_bench({**options, "output_dir": str(out)}, run=run)
    assert (run.cells, run.stages) == ([], [])
    assert (out / "results.jsonl").read_bytes() == before


def test_a_changed_option_runs_only_what_it_changes(whole, options, run):
    out, _ = whole
    run_bench({**options, "output_dir": str(out)}, "evaluate.num_samples=3", run=run)
    assert "compress" not in run.stages
    assert "train" not in run.stages
    assert len(run.cells) == 6


def test_a_cell_is_known_by_its_format_and_low_rank_by_having_none(options, tmp_path):
    """So records from before there were formats are still those of low rank."""

    def light(compress):
        config = read_config({**options, "compress": compress, "output_dir": str(tmp_path)})
        data = prepare_data(config, "words")
        return method_cell(config, data, "words", "emloc", 0.4, 0, 1e-3).inputs["compress"]

    assert "format" not in light({"format": "low_rank"})
    assert (
        light({})
        == light({"format": "auto"})
        == {**light({"format": "low_rank"}), "format": "auto"}
    )


def test_tables_and_plots(whole):
    out, _ = whole
    text = (out / "tables.md").read_text()
    titles = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert titles == [
        "exact match, keep_ratio 0.4", "exact match, keep_ratio 0.7", "loss, keep_ratio 0.4",
        "loss, keep_ratio 0.7", "gain recovered, keep_ratio 0.4", "gain recovered, keep_ratio 0.7",
        "cost",
    ]  # fmt: skip
    by = {(r["label"], r["keep_ratio"]): r for r in records(out)}
    loss = text.split("### loss, keep_ratio 0.4")[1].split("###")[0]
    for label, ratio in (("base", None), ("lora", None), ("emloc", 0.4)):
        [row] = [line for line in loss.splitlines() if line.startswith(f"| {label} |")]
        assert row.endswith(f"| {by[label, ratio]['loss']:.4f} |")
    gain = text.split("### gain recovered, keep_ratio 0.4")[1].split("###")[0]
    base, lora = by["base", None]["loss"], by["lora", None]["loss"]
    expected = (base - by["emloc", 0.4]["loss"]) / (base - lora)
    assert f"| {expected:.0%} |" in gain
    assert "| lora | " in gain
    assert "| 100% |" in gain
    for name in ("score.png", "loss.png", "gain.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_what_a_method_gave_is_polished_where_a_row_says_so(whole, options, run, tmp_path):
    """From the adapter of the row beside it; gains stay measured by the LoRA that is not polished."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    polish = {"max_steps": 2, "samples_per_step": 4, "num_held_back_samples": 4, "stream": False}
    rows = {
        "longer": {"method": "lora", "polish": {}},
        "lora": None,
        "emloc": None,
        "polished": {"method": "emloc", "polish": {"learning_rate": 1e-3}},
        "not": {"method": "emloc", "polish": False},
    }
    options = {
        **options,
        "output_dir": str(out),
        "keep_ratio": [0.4],
        "polish": polish,
        "methods": rows,
    }
    run_bench(options, run=run)
    by = {record["label"]: record for record in records(out)}
    assert sorted(run.cells) == ["words, longer, seed 0", "words, polished, keep 0.4, seed 0"]
    assert run.stages == ["polish", "polish"], "all before them was there"
    for label in ("longer", "polished"):
        polished, kept = by[label], by[label]["polish"]["kept"]
        assert polished["seconds"]["polish"] > 0
        assert "polish" in polished["peak_bytes"]
        assert (polished["loss"] != by["emloc" if label == "polished" else "lora"]["loss"]) == kept
        assert polished["inputs"]["polish"]["max_steps"] == 2
    assert by["polished"]["inputs"]["polish"]["learning_rate"] == 1e-3
    assert "polish" not in by["emloc"]
    assert "polish" not in by["emloc"]["inputs"]
    gains = {record["label"]: record["gain"] for record in gains_recovered(records(out))}
    assert gains["lora"] == 1
    text = (out / "tables.md").read_text()
    assert "polishing" in text.split("### cost")[1].splitlines()[2]


def test_published_numbers_stand_beside_ours(whole, options, run):
    out, _ = whole
    run_bench(
        {**options, "output_dir": str(out), "published": {"lora": {"words": "76.2"}}}, run=run
    )
    text = (out / "tables.md").read_text()
    assert "words, published" in text
    assert re.search(r"\| lora \|.*\| 76.2 \|", text)


def test_a_killed_bench_goes_on(options, tmp_path, monkeypatch):
    out = {**options, "output_dir": str(tmp_path / "out"), "keep_ratio": 0.4}
    out["train"] = {**options["train"], "learning_rate": 1e-3}
    with monkeypatch.context() as patch:
        stopped = Counting(patch, only=2)
        with pytest.raises(KeyboardInterrupt):
            run_bench(out, run=stopped)
    with monkeypatch.context() as patch:
        resumed = Counting(patch)
        run_bench(out, run=resumed)
    assert len(stopped.cells) == 2
    assert len(stopped.cells) + len(resumed.cells) == 4
    assert not set(stopped.cells) & set(resumed.cells)
    assert len(records(tmp_path / "out")) == 4


@pytest.mark.long
def test_cells_run_in_processes_from_the_command_line(options, tmp_path):
    import yaml

    config = tmp_path / "bench.yaml"
    config.write_text(yaml.safe_dump({**options, "methods": ["lora"]}))
    run = run_python(
        "-m", "emloc", "bench", config, f"output_dir={tmp_path / 'out'}",
        "keep_ratio=0.4", "train.learning_rate=0.001", "train.max_steps=2",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(tmp_path / "out")
    assert [r["label"] for r in records(tmp_path / "out")] == ["base", "lora"]
    assert len(list((tmp_path / "out/logs").glob("*.log"))) == 2


def test_a_cell_that_fails_is_named_and_the_others_are_there(options, tmp_path, monkeypatch):
    def fail(cell, root):
        if cell.label == "emloc":
            raise EmlocError("no luck")
        cell_module.run_cell(cell, root)

    one = {**options, "output_dir": str(tmp_path / "out"), "keep_ratio": 0.4}
    one["train"] = {**options["train"], "learning_rate": 1e-3}
    with pytest.raises(
        EmlocError, match=r"1 cell\(s\) failed; the first is words, emloc.*\(no luck\)"
    ):
        run_bench(one, run=fail)
    assert [r["label"] for r in records(tmp_path / "out")] == ["base", "lora", "emloc-uncorrected"]


def test_a_learning_rate_that_diverges_is_not_chosen(options, tmp_path):
    def diverge(cell, root):
        if cell.learning_rate == 1e-2:
            raise NumericalError("NaN")
        cell_module.run_cell(cell, root)

    one = {**options, "output_dir": str(tmp_path / "out"), "keep_ratio": 0.4, "methods": ["lora"]}
    run_bench(one, run=diverge)
    assert [r["learning_rate"] for r in records(tmp_path / "out")] == [None, 1e-4]


def test_a_row_may_have_data_of_its_own(options, tiny, tmp_path):
    """Only the file that was split is replaced; a row that differs in nothing else stays in the tables."""
    config = read_config({
        **options, "output_dir": str(tmp_path / "out"), "keep_ratio": 0.4,
        "methods": {
            "emloc": {}, "same": {"method": "emloc"},
            "fresh": {"method": "emloc", "correct": {"dataset": str(tiny.test)}, "polish": {}},
        },
    })  # fmt: skip
    data = prepare_data(config, "words")
    cells = measured_cells(config, data, "words", dict.fromkeys(config.methods, 1e-3))
    assert [cell.label for cell in cells] == ["base", "emloc", "same", "fresh"]
    plain, same, fresh = cells[1:]
    assert plain.digest == same.digest
    assert fresh.task.correct["dataset"] == str(tiny.test)
    assert fresh.task.train["dataset"] == plain.task.correct["dataset"] == fresh.polish["dataset"]
    assert fresh.task.train["dataset"] != str(tiny.data)
    assert fresh.steps["adapter"] == plain.steps["adapter"]
    assert fresh.steps["recovered"] != plain.steps["recovered"]


def test_a_rate_that_fails_otherwise_is_tried_again(options, tmp_path):
    """A full disk says nothing about a learning rate: the row waits, and the bench says that it failed."""

    def fail(cell, root):
        if cell.learning_rate == 1e-2:
            raise OutputError("the disk is full")
        cell_module.run_cell(cell, root)

    one = {**options, "output_dir": str(tmp_path / "out"), "keep_ratio": 0.4, "methods": ["lora"]}
    with pytest.raises(EmlocError, match="the disk is full"):
        run_bench(one, run=fail)
    assert [r["label"] for r in records(tmp_path / "out")] == ["base"]


def test_another_measure_is_shown_and_a_wrong_one_refused(options, tmp_path, run):
    one = {
        **options, "output_dir": str(tmp_path / "out"), "keep_ratio": 0.4, "methods": ["lora"],
        "train": {**options["train"], "learning_rate": 1e-3},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="has no score exact_mach; it has .*exact_match"):
        run_bench({**one, "measure": "exact_mach"}, run=run)
    run_bench({**one, "measure": "exact_match"}, run=run)
    assert all(r["score"] is not None for r in records(tmp_path / "out"))
    assert run.cells == ["words, base", "words, lora, seed 0"], "scores were taken once"


def test_pictures_belong_to_a_cells_identity(tmp_path):
    example = family_named("vlm").write_example(tmp_path / "example", seed=0)
    given = {
        "model_name_or_path": example["model_name_or_path"], "output_dir": str(tmp_path / "out"),
        "datasets": {"shapes": {k: v for k, v in example.items() if k != "model_name_or_path"}},
        "methods": ["emloc"], "validation_samples": 0, "train": {"learning_rate": 1e-3},
    }  # fmt: skip
    config = read_config(given)

    def digests():
        files_named.cache_clear()
        data = prepare_data(config, "shapes")
        return method_cell(config, data, "shapes", "emloc", 0.4, 0, 1e-3).steps

    before = digests()
    picture = next(Path(tmp_path / "example").rglob("*.png"))
    picture.write_bytes(picture.read_bytes() + b"\0")
    after = digests()
    assert all(before[step] != after[step] for step in before)


def test_two_benches_in_one_folder_are_refused(options, tmp_path, run):
    out = tmp_path / "out"
    with output_lock(out.resolve()), pytest.raises(OutputError, match="Another process is writing"):
        run_bench({**options, "output_dir": str(out)}, run=run)


REFUSALS = [
    ({"methods": ["lorra"]}, "offers the method 'lorra'"),
    ({"methods": {"lora": {"rank": 3}}}, r"methods.lora: unknown option rank"),
    ({"methods": {"base": {}}}, "always there"),
    ({"methods": {}}, "methods"),
    ({"datasets": {}}, "datasets"),
    ({"max_lenght": 3}, "unknown key max_lenght. Did you mean max_length"),
    ({"train": {"lora_rank": 3}}, "train: unknown option lora_rank"),
    ({"train": {"seed": 3}}, "train.seed is set by the bench"),
    ({"train": {"learning_rate": [None, 0.01]}}, "learning_rate = .* should be numbers"),
    ({"keep_ratio": [2]}, "keep_ratio"),
    ({"datasets": {"words": {"datset": "x"}}}, "datasets.words: unknown key datset"),
    ({"methods": {"lora": {"polish": {"learning_rate": "abc"}}}}, "learning_rate"),
    ({"polish": {"learning_rate": -1}}, "learning_rate"),
    ({"polish": {"learning_rate": [1e-3, 1e-2]}}, "learning_rate"),
    ({"methods": {"emloc": {"correct": {"strength": 0.5, "limit": 1}}}}, "limit and strength"),
    ({"correct": {"limit": 1, "strength_candidates": [0.5]}}, "strength_candidates"),
    (
        {"methods": {"lora": {"polish": {"samples_per_step": 10}}}},
        "samples_per_step=10 is not a multiple",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_mistakes_are_found_before_anything_runs(options, tmp_path, change, message, run):
    with pytest.raises(EmlocError, match=message):
        run_bench({**options, "output_dir": str(tmp_path / "out"), **change}, run=run)
    assert run.cells == []
    assert not (tmp_path / "out").exists()


def test_rates_to_choose_from_are_no_rate_of_polish(options, tmp_path):
    train = {k: v for k, v in options["train"].items() if k != "learning_rate"}
    config = read_config({
        **options, "output_dir": str(tmp_path / "out"), "train": train, "learning_rate": [1e-3, 1e-2],
        "methods": {"lora": {"polish": {}}},
    })  # fmt: skip
    assert config.learning_rates("words", "lora") == [1e-3, 1e-2]
    assert "learning_rate" not in config.polish_options("words", "lora")


def test_later_places_win(options, tmp_path):
    config = read_config(
        {
            **options, "output_dir": "x", "learning_rate": 1.0,
            "methods": {"short": {"method": "lora", "train": {"max_steps": 1}}, "lora": None},
        },
        "datasets.words.max_length=48", "train.learning_rate=0.5",
    )  # fmt: skip
    assert config.stage_options("train", "words", "short")["max_steps"] == 1
    assert config.stage_options("train", "words", "lora")["max_steps"] == 3
    assert config.stage_options("evaluate", "words")["max_length"] == 48
    assert config.learning_rates("words", "lora") == [0.5]


def test_validation_rows_do_not_depend_on_how_many_are_trained_on(tiny, tmp_path):
    _, all_of = split_rows(tiny.data, tmp_path, 5, None)
    few, some = split_rows(tiny.data, tmp_path, 5, 4)
    assert all_of.read_text() == some.read_text()
    assert len(few.read_text().splitlines()) == 4
    assert not set(few.read_text().splitlines()) & set(some.read_text().splitlines())
    with pytest.raises(ConfigError, match="not a JSONL"):
        split_rows(tmp_path, tmp_path, 5, 4)
    with pytest.raises(
        DataError, match=r"there is no .*nowhere\.jsonl; give the data set's own path"
    ):
        split_rows(tmp_path / "nowhere.jsonl", tmp_path, 5, 4)


def test_diffusion_pipelines_are_compared_too(tmp_path):
    from emloc.extend.plugins import family_named

    example = dict(family_named("diffusion").write_example(tmp_path / "data", seed=0))
    base, pictures = example.pop("model_name_or_path"), example.pop("dataset")
    out = run_bench(
        {
            "model_name_or_path": base, "output_dir": str(tmp_path / "out"), **example,
            "keep_ratio": 0.5, "compress": {"format": "low_rank"},
            "train": {"max_steps": 2, "lora_r": 2, "learning_rate": 1e-3},
            "evaluate": {"num_noise_samples": 8}, "correct": {"limit": "none"},
            "datasets": {"squares": {"instance_data_dir": pictures}},
            "methods": ["lora", "emloc", "emloc-uncorrected"],
        },
        run=lambda cell, root: cell_module.run_cell(cell, root),
    )  # fmt: skip
    found = {record["label"]: record for record in records(out)}
    assert list(found) == ["base", "lora", "emloc", "emloc-uncorrected"]
    assert 0 < found["emloc"]["held_bytes"] < found["lora"]["held_bytes"]
    assert len({record["loss"] for record in found.values()}) == 4
    assert all(record["score"] is None for record in found.values())
    text = (out / "tables.md").read_text()
    assert "exact match" not in text
    assert "### gain recovered, keep_ratio 0.5" in text
    assert not (out / "score.png").exists()


def test_ctrl_c_says_how_to_go_on(options, tmp_path):
    """To the whole group, as a terminal sends it: the bench and its cell."""
    import os
    import signal
    import time

    import yaml

    config, out = tmp_path / "bench.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump({**options, "methods": ["lora"], "output_dir": str(out)}))
    # A shell that runs this in the background would have it ignore Ctrl-C.
    process = subprocess.Popen(
        [sys.executable, "-c",
         "import signal, runpy, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
         f"sys.argv = ['emloc', 'bench', {str(config)!r}]; runpy.run_module('emloc', run_name='__main__')"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for _ in range(600):
        if list(out.glob("logs/*.log")):
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finished cells are kept" in errors
    assert "Traceback" not in errors


def test_landed_records_are_finished_cells_elsewhere(whole, options, run, tmp_path):
    """Only what is missing is run, at the learning rates that were chosen then."""
    resume = load("resume").resume
    landed = [r for r in records(whole[0]) if (r["label"], r["keep_ratio"]) != ("emloc", 0.7)]
    other = {**landed[0], "digest": "0" * 64}
    config = read_config({**options, "output_dir": str(tmp_path / "out")})
    assert resume(config, [*landed, other]) == (6, 5, 1)
    run_bench({**options, "output_dir": str(tmp_path / "out")}, run=run)
    assert len(run.cells) == 1
    assert "emloc, keep 0.7" in run.cells[0]
    for ours, theirs in zip(records(tmp_path / "out"), records(whole[0]), strict=True):
        assert ours["digest"] == theirs["digest"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["learning_rate_losses"] == theirs["learning_rate_losses"]


def test_losses_of_another_bench_choose_no_learning_rate(whole, options, tmp_path):
    """Rows of the same name, of other training: nothing of them may be taken for this bench's."""
    train = {**options["train"], "max_steps": 4}
    config = read_config({**options, "train": train, "output_dir": str(tmp_path / "out")})
    assert load("resume").resume(config, records(whole[0])) == (1, 1, 5)  # the base alone
    assert len(list((tmp_path / "out/cells").iterdir())) == 1
