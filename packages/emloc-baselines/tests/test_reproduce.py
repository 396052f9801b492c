"""The reproduction's configurations are valid, and its converters do what they say."""

import json

import pytest
from PIL import Image
from reproduce_tools import FOLDER, load

from emloc_baselines.bench.config import read_config
from emloc_baselines.bench.records import read_records
from emloc_baselines.bench.tables import budgets, labels, matching, summarise
from emloc_llm.evaluation import matches


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_valid(path):
    config = read_config(path)
    for dataset in config.datasets:
        for label in config.methods:
            rates = config.learning_rates(dataset, label)
            assert rates == config.learning_rates(dataset, "lora"), "one grid for all"
            if not label.startswith("from nothing"):  # rows that say how many steps they take
                steps = config.stage_options("train", dataset, label)["max_steps"]
                assert steps == config.stages["train"]["max_steps"]


def test_mathqa_rows_are_prompts_with_options_and_end_in_the_letter(tmp_path):
    prepare = load("prepare")
    entry = {
        "Problem": "what is 2 , 000 + 1 ?",
        "options": "a ) 2 , 001 , b ) 2 , 000 , c ) 20 , d ) 1 / 2 , e ) none of these",
        "Rationale": '"add them . answer a"',
        "correct": "a",
    }
    for name in ("dev.json", "test.json"):
        (tmp_path / name).write_text(json.dumps([entry, entry]))
    out = prepare.mathqa(tmp_path, tmp_path / "out")
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0]["prompt"].splitlines() == [
        "what is 2 , 000 + 1 ?", "a) 2 , 001", "b) 2 , 000", "c) 20", "d) 1 / 2", "e) none of these",
        "Reason, then give the letter after ####.",
    ]  # fmt: skip
    assert rows[0]["completion"] == "add them . answer a\n#### a"
    assert matches(rows[0]["completion"], "so 2001\n#### A")
    assert not matches(rows[0]["completion"], "so 2001\n#### b")


def test_text_becomes_rows_of_paragraphs(tmp_path):
    prepare = load("prepare")
    (tmp_path / "x.raw").write_text(" = Title = \n\n" + "word " * 60 + "\n" + "short\n")
    out = prepare.text(tmp_path / "x.raw", tmp_path / "rows.jsonl")
    [row] = [json.loads(line) for line in out.read_text().splitlines()]
    assert row == {"text": ("word " * 60).strip()}


def test_overhead_is_projected_from_measured_tokens():
    rows = load("overhead").overhead(
        [
            {"method": None},
            {"method": "emloc", "label": "emloc", "keep_ratio": 0.5, "overhead_seconds": 36.0,
             "continued": {}},
            {"method": "loram-stru", "label": "loram", "keep_ratio": 0.5, "overhead_seconds": 50.0,
             "continued": {"tokens": 1000, "seconds": 10.0, "steps": 4, "as": "alignment"}},
        ],
        tokens=3_600_000,
    )  # fmt: skip
    assert [row["row"] for row in rows] == ["emloc", "loram"]
    assert rows[0]["hours"] == pytest.approx(0.01)
    assert rows[1]["tokens_per_second"] == 100
    assert rows[1]["hours"] == pytest.approx(10 + 40 / 3600)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("results/*.jsonl")), ids=lambda path: path.stem)
def test_the_readme_has_the_losses_of_the_records(path):
    shown = (FOLDER / "README.md").read_text().replace("**", "")
    records = read_records(path)
    for budget in budgets(records):
        for label in labels(records):
            for dataset in {record["dataset"] for record in records}:
                own = matching(records, label=label, keep_ratio=budget, dataset=dataset)
                assert summarise([record["loss"] for record in own], "{:.4f}") in shown, own[:1]


def test_published_numbers_are_printed_beside_the_records(monkeypatch, capsys):
    paths = sorted(map(str, FOLDER.glob("results/llm-gsm8k*.jsonl")))
    monkeypatch.setattr("sys.argv", ["tables.py", *paths, "--config", str(FOLDER / "llm.yaml")])
    load("tables").main()
    printed = capsys.readouterr().out.splitlines()
    assert "gsm8k, published" in next(line for line in printed if line.startswith("|"))
    assert any(line.startswith("| emloc |") and line.endswith("| 29.8% |") for line in printed)


def test_tables_are_printed_from_records(monkeypatch, capsys):
    path = FOLDER / "results/ablation-vlm.jsonl"
    monkeypatch.setattr("sys.argv", ["tables.py", str(path)])
    load("tables").main()
    printed = capsys.readouterr().out.splitlines()
    assert "| activation-aware, auto | 4.2 MiB | 0.0417 (0.0134) | 2.7402 (0.0154) |" in printed
    costs = {line.split(" | ")[0]: line.split(" | ")[-1] for line in printed[-7:]}
    assert costs["| activation-aware, auto"] == "3, 0.3, 0, 3, 1, 0 |"
    assert costs["| activation-aware, L = 3"] == "3 |"
    assert costs["| lora"] == "– |"


def test_rows_that_share_a_lora_are_compared_cell_by_cell(monkeypatch, capsys, tmp_path):
    def record(label, seed, loss, keep_ratio=0.5):
        return {
            "label": label,
            "dataset": "d",
            "keep_ratio": keep_ratio,
            "seed": seed,
            "loss": loss,
        }

    records = [
        record("base", None, 3.0, None), record("lora", 0, 1.0, None), record("a", 0, 1.0),
        record("a", 1, 1.5), record("a", 2, 2.0), record("a", 3, 1.0), record("b", 0, 1.2),
        record("b", 1, 1.4), record("b", 2, 2.0), record("b", 0, 9.0, 0.6), record("b", 3, 1.3),
    ]  # fmt: skip
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    argv = ["paired.py", str(path), str(path), "--row", "a", "--against", "b"]
    monkeypatch.setattr("sys.argv", argv)
    load("paired").main()
    printed = capsys.readouterr().out.splitlines()
    assert "5.00%" in printed[-2 - 1], "0.1 of 2"
    together = json.loads(printed[-1])
    assert (together["lower"], together["higher"], together["equal"]) == (4, 2, 2)
    assert together["mean"] == pytest.approx(0.1)
    # Of six throws four or more on one side: (15 + 6 + 1) / 64, either side.
    assert together["probability"] == pytest.approx(44 / 64)
    monkeypatch.setattr("sys.argv", [*argv[:-1], "c"])
    with pytest.raises(SystemExit):
        load("paired").main()
    assert "no cell of these files has both rows, a against c" in capsys.readouterr().err


def test_pictures_are_drawn_from_records(monkeypatch, tmp_path):
    path = FOLDER / "results/vlm.jsonl"
    monkeypatch.setattr("sys.argv", ["tables.py", str(path), "--plots", str(tmp_path / "new")])
    load("tables").main()
    for name in ("score", "loss", "gain"):
        with Image.open(tmp_path / f"new/{name}.png") as picture:
            assert picture.width > picture.height > 400  # two data sets side by side


@pytest.mark.parametrize(
    "argv",
    [
        ["tables", "FILE"],
        ["paired", "FILE", "--row=a", "--against=b"],
        ["overhead", "--results=FILE", "--tokens=1"],
        ["resume", str(FOLDER / "llm.yaml"), "--results", "FILE"],
    ],
    ids=lambda argv: argv[0],
)
def test_what_is_not_records_is_named(monkeypatch, capsys, tmp_path, argv):
    (tmp_path / "lines.jsonl").write_text('{"dataset": "d"}\n3\n')
    for name, said in (
        ("nowhere.jsonl", "there is no nowhere.jsonl; give records"),
        ("lines.jsonl", "line 2 of lines.jsonl is not a record; give records"),
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [part.replace("FILE", name) for part in argv])
        with pytest.raises(SystemExit):
            load(argv[0]).main()
        assert said in capsys.readouterr().err
