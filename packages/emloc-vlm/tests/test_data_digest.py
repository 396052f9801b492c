"""A picture that changed under the same rows is another data set, for every form of rows."""

import json
import shutil

import pytest
from PIL import Image
from vlm_stage_options import visual_options

import emloc
from emloc.artefacts.digest import dataset_digest
from emloc.config import EvaluateConfig
from emloc.errors import OutputError
from emloc.stages.data_digest import data_digest
from emloc_vlm.family import VLMFamily


def paint(path, color):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), color).save(path)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(name="a.png", **more):
    return {"image": name, "question": "colour?", "answer": "red", **more}


def jsonl(home):
    return {"dataset": write(home / "t.jsonl", row("pictures/a.png"), row("pictures/a.png"))}


def as_json(home):
    (home / "t.json").write_text(json.dumps([row("pictures/a.png")]))
    return {"dataset": home / "t.json"}


def csv(home):
    (home / "t.csv").write_text("image,question,answer\npictures/a.png,colour?,red\n")
    return {"dataset": home / "t.csv"}


def parquet(home):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([row("pictures/a.png")]).to_parquet(str(home / "t.parquet"))
    return {"dataset": home / "t.parquet"}


def chat(home):
    question = {"role": "user", "content": [{"type": "image", "path": "pictures/a.png"}]}
    turns = [question, {"role": "assistant", "content": "red"}]
    return {"dataset": write(home / "t.jsonl", {"messages": turns})}


def meta(home):
    write(home / "rows.jsonl", {"image": "a.png", "conversations": [
        {"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "red"}]})  # fmt: skip
    content = {
        "one": {"root": str(home / "pictures"), "annotation": "rows.jsonl", "repeat_time": 2}
    }
    (home / "meta.json").write_text(json.dumps(content))
    return {"dataset": home / "meta.json"}


def elsewhere(home):
    (home / "rows").mkdir()
    return {"dataset": write(home / "rows/t.jsonl", row()), "image_folder": home / "pictures"}


def several(home):
    paint(home / "other.png", "green")
    other = write(home / "other.jsonl", row("other.png"))
    return {"dataset": f"{other},{jsonl(home)['dataset']}"}


def folder(home):
    (home / "rows").mkdir()
    write(home / "rows/train.jsonl", row())
    return {"dataset": home / "rows", "image_folder": home / "pictures"}


def benchmark(home):
    return {"dataset": write(home / "rad.jsonl", row("pictures/a.png", answer_type="OPEN"))}


FORMS = [jsonl, as_json, csv, parquet, chat, meta, elsewhere, several, folder, benchmark]


def digest(options, split="train"):
    given = visual_options(**{name: str(value) for name, value in options.items()})
    return data_digest(given.dataset, split, given, VLMFamily())


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_picture_changes_the_digest(tmp_path, form):
    picture = tmp_path / "home/pictures/a.png"
    paint(picture, "red")
    options = form(tmp_path / "home")
    first = digest(options)
    assert digest(options) == first
    paint(tmp_path / "home/pictures/unnamed.png", "red")
    assert digest(options) == first
    paint(picture, "blue")
    changed = digest(options)
    assert changed != first
    picture.unlink()
    assert digest(options) not in (first, changed)
    paint(picture, "red")
    assert digest(options) == first
    if form not in (meta, parquet):  # which hold absolute paths, or are written anew
        shutil.move(tmp_path / "home", tmp_path / "moved")
        moved = {
            k: str(v).replace(str(tmp_path / "home"), str(tmp_path / "moved"))
            for k, v in options.items()
        }
        assert digest(moved) == first


def test_files_beside_the_one_that_is_named(tmp_path):
    home = tmp_path / "home"
    paint(home / "pictures/a.png", "red")
    options = meta(home)
    first = digest(options)
    (home / "rows.jsonl").write_text((home / "rows.jsonl").read_text().replace("red", "blue"))
    assert digest(options) != first
    paint(home / "val2014/COCO_val2014_000000000042.jpg", "red")
    asked = {"image_id": 42, "question": "?", "question_id": 1}
    said = {"question_id": 1, "image_id": 42, "answers": [{"answer": "red"}]}
    questions, annotations = home / "v2_OpenEnded_mscoco_val2014_questions.json", (
        home / "v2_mscoco_val2014_annotations.json"
    )  # fmt: skip
    questions.write_text(json.dumps({"data_subtype": "val2014", "questions": [asked]}))
    annotations.write_text(json.dumps({"annotations": [said]}))
    for one, other in ((questions, annotations), (annotations, questions)):
        first = digest({"dataset": one})
        other.write_text(other.read_text() + " ")
        assert digest({"dataset": one}) != first
        first = digest({"dataset": one})
        paint(home / "val2014/COCO_val2014_000000000042.jpg", "blue" if one is questions else "red")
        assert digest({"dataset": one}) != first


def test_only_rows_that_are_scored_count(tmp_path):
    paint(tmp_path / "a.png", "red")
    paint(tmp_path / "b.png", "red")
    path = str(write(tmp_path / "t.jsonl", row("a.png"), row("b.png")))
    few = visual_options(EvaluateConfig, dataset=path, num_samples=1)
    every = few.model_copy(update={"num_samples": None})
    first = [data_digest(path, "train", options, VLMFamily()) for options in (few, every)]
    paint(tmp_path / "b.png", "blue")
    second = [data_digest(path, "train", options, VLMFamily()) for options in (few, every)]
    assert (first[0] == second[0], first[1] == second[1]) == (True, False)


def test_names_that_are_no_files(tmp_path):
    assert digest({"dataset": "somebody/data"}) == "somebody/data"
    comma = tmp_path / "a,b"
    comma.mkdir()
    paint(comma / "a.png", "red")
    first = dataset_digest(str(comma))
    paint(comma / "a.png", "blue")
    assert dataset_digest(str(comma)) != first


def test_stages_notice_a_changed_picture(tiny, tmp_path):
    for path in [*tiny.root.glob("t*.jsonl"), *tiny.root.glob("t*.png")]:
        shutil.copy(path, tmp_path)
    train = {**tiny.train_options, "dataset": str(tmp_path / "train.jsonl"), "max_steps": 1,
             "eval_dataset": str(tmp_path / "test.jsonl"), "output_dir": tmp_path / "adapter"}  # fmt: skip
    score = {"model_name_or_path": str(tiny.base), "dataset": str(tmp_path / "test.jsonl"), "max_length": 96,
             "max_new_tokens": 0, "output_dir": tmp_path / "scores"}  # fmt: skip
    emloc.train(**train)
    emloc.evaluate(**score)
    emloc.train(**train)
    emloc.evaluate(**score)
    picture = tmp_path / "test-003.png"
    Image.open(picture).point(lambda value: 255 - value).save(picture)
    for stage, options in ((emloc.train, train), (emloc.evaluate, score)):
        with pytest.raises(OutputError, match="was made with other"):
            stage(**options)
