import json
from pathlib import Path
from typing import Any

import pytest
from vlm_stage_options import visual_options

from emloc.errors import DataError
from emloc_vlm.benchmarks import read_benchmark
from emloc_vlm.rows import load_examples
from emloc_vlm.scoring import METRICS

PMC_1 = (
    "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
    "PMC1_F1.jpg,What is the uptake pattern?,Focal uptake, A:Diffuse uptake, B:Focal uptake, C:None,"
    " D:Cannot determine,B\n"
)
PMC_2 = (
    "index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split\n"
    '35,PMC2_F4.jpg,"A cell,\nin two lines.", What color is it?, A: Green , B: Red , C: Light blue ,'
    " D: Yellow,B,train\n"
    "36,PMC3_F1.jpg,One line., What stain?,A:H&E,B:PAS,C:Silver, ,A,train\n"
)
WEBSRC = (
    "id,question,answer,element_id,answer_start\n"
    "mo040009941265,Is Adam Sandler one of the actors?,yes,-1,1\n"
    'mo040006527817,What genre is this movie?,"Sci-fi, action",31,0\n'
)
RAD = [
    {"qid": 1, "image_name": "synpic1.jpg", "question": "Is it axial?", "answer": "Yes",
     "answer_type": "CLOSED", "question_type": "PLANE", "phrase_type": "freeform"},
    {"qid": 2, "image_name": "synpic2.jpg", "question": "How many lesions?", "answer": 4,
     "answer_type": "OPEN ", "question_type": "COUNT", "phrase_type": "test_para"},
]  # fmt: skip
OPTIONS = "1. Okpa\n2. Moin moin\n3. Calf's liver\n4. Red bean paste\n5. ナシ"


def cuisine(**changes: Any) -> dict[str, Any]:
    asked = changes.pop("asked", "I ate this abroad.\nWhat is this dish called?")
    return {
        "qa_id": "20", "lang": "en", "food_id": "548", "prompt_id": "9", "prompt_type": "1",
        "multi_choice_prompt": f"{asked}\n{OPTIONS}\n\nPrint only the answer with a single answer id.",
        "open_ended_prompt": f"{asked}\n\nPrint only the answer.",
        "image_url": "https://upload.wikimedia.org/a/ab/Caf%C3%A9_dish.jpg?download",
        "answer": "Moin moin", "multi_choice_answer": 2, "task": "small_task1", **changes,
    }  # fmt: skip


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def rows(path: Path, image_folder: Path | None = None) -> list[dict[str, Any]]:
    found = read_benchmark(path, image_folder)
    assert found is not None
    for row in found:
        assert isinstance(row["image"], bytes) or Path(row["image"]).is_absolute()
        assert row["metric"] in METRICS
        # The right answer gets full marks from the benchmark's own metric.
        answered = {**row, "reference": row["answer"], "prediction": row["answer"]}
        if isinstance(row["answer"], list):
            answered["prediction"] = row["answer"][0]
        assert METRICS[row["metric"]].score(answered)["exact_match"] == 1
    return found


def test_pmc_vqa_of_the_first_release(tmp_path: Path):
    image = write(tmp_path / "images/PMC1_F1.jpg", "")
    assert rows(write(tmp_path / "test_clean.csv", PMC_1)) == [
        {
            "image": str(image),
            "question": "What is the uptake pattern?",
            "answer": "B",
            "options": {
                "A": "Diffuse uptake", "B": "Focal uptake", "C": "None", "D": "Cannot determine",
            },
            "kind": "multiple_choice",
            "line": 2,
            "metric": "multiple_choice",
        }
    ]  # fmt: skip


def test_pmc_vqa_of_the_second_release(tmp_path: Path):
    image = write(tmp_path / "figures/PMC2_F4.jpg", "")
    first, second = rows(write(tmp_path / "train_2.csv", PMC_2))
    assert first["image"] == str(image)
    assert first["question"] == "What color is it?"
    assert first["options"] == {"A": "Green", "B": "Red", "C": "Light blue", "D": "Yellow"}
    assert (first["answer"], first["line"], second["line"]) == ("B", 2, 4)
    assert second["options"] == {"A": "H&E", "B": "PAS", "C": "Silver"}
    # Images that are not there yet are expected in the first of the usual folders.
    assert second["image"] == str(tmp_path / "images/PMC3_F1.jpg")


def test_pmc_vqa_without_a_label_finds_the_answer_among_the_choices(tmp_path: Path):
    header, row = PMC_1.splitlines()
    content = f"{header.removesuffix(',Answer_label')}\n{row.removesuffix(',B')}\n"
    assert rows(write(tmp_path / "a.csv", content))[0]["answer"] == "B"


def test_websrc_finds_the_screenshot_by_the_id(tmp_path: Path):
    image = write(tmp_path / "movie/04/processed_data/0400099.png", "")
    first, second = rows(write(tmp_path / "movie/04/dataset.csv", WEBSRC))
    assert first == {
        "image": str(image),
        "question": "Is Adam Sandler one of the actors?",
        "answer": "yes",
        "line": 2,
        "metric": "websrc",
    }
    assert second["answer"] == "Sci-fi, action"
    assert second["image"].endswith("movie/04/processed_data/0400065.png")


def test_websrc_with_a_column_of_images(tmp_path: Path):
    row = {
        "image": "images/a.jpg",
        "question": "q\u2028?",
        "answer": '66 "',
        "id": "au1",
        "element_id": "1",
    }
    found = rows(write(tmp_path / "all.jsonl", "\n" + lines(row) + "\n" + lines(row)))
    assert [row["line"] for row in found] == [2, 4]
    assert found[0]["image"] == str(tmp_path / "images/a.jpg")
    assert found[0]["question"] == "q\u2028?"


def test_worldcuisines_asks_twice(tmp_path: Path):
    image = write(tmp_path / "images/Café_dish.jpg", "")
    question = "I ate this abroad.\nWhat is this dish called?"
    assert rows(write(tmp_path / "en.jsonl", lines(cuisine()))) == [
        {
            "image": str(image),
            "question": question,
            "answer": "2",
            "options": dict(
                zip("12345", ["Okpa", "Moin moin", "Calf's liver", "Red bean paste", "ナシ"])
            ),
            "kind": "multiple_choice",
            "line": 1,
            "metric": "worldcuisines",
        },
        {
            "image": str(image),
            "question": f"{question}\n\nPrint only the answer.",
            "answer": "Moin moin",
            "kind": "open",
            "line": 1,
            "metric": "worldcuisines",
        },
    ]


def test_worldcuisines_accepts_the_answers_of_all_languages_of_the_same_question(tmp_path: Path):
    path = write(
        tmp_path / "all.jsonl",
        lines(
            cuisine(),
            cuisine(lang="ja_formal", answer="モインモイン"),
            cuisine(lang="fr"),
            cuisine(qa_id="21", answer="Okpa"),
        ),
    )
    answers = [row["answer"] for row in rows(path) if row["kind"] == "open"]
    both = {"Moin moin", "モインモイン"}
    assert [set(answer) for answer in answers[:3]] == [both] * 3
    assert [answer[0] for answer in answers[:3]] == ["Moin moin", "モインモイン", "Moin moin"]
    assert answers[3] == "Okpa"


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_worldcuisines_in_other_containers(tmp_path: Path, suffix: str):
    datasets = pytest.importorskip("datasets")
    expected = rows(write(tmp_path / "a.jsonl", lines(cuisine(), cuisine(qa_id="21"))))
    path = tmp_path / f"a.{suffix}"
    table = datasets.Dataset.from_list([cuisine(), cuisine(qa_id="21")])
    getattr(table, f"to_{suffix}")(str(path))
    found = rows(path)
    assert [{**row, "line": 0} for row in found] == [{**row, "line": 0} for row in expected]


def test_worldcuisines_with_a_list_of_options(tmp_path: Path):
    row = {
        "qa_id": 7, "lang": "en", "question": "What is it?", "options": ["Okpa", "Moin moin"],
        "mcq_answer_index": 1, "answer": "Moin moin", "image_path": "images/7.jpg",
    }  # fmt: skip
    choice, free = rows(write(tmp_path / "a.jsonl", lines(row)))
    assert choice["options"] == {"1": "Okpa", "2": "Moin moin"}
    assert (choice["answer"], free["answer"]) == ("2", "Moin moin")
    assert choice["question"] == free["question"] == "What is it?"
    assert choice["image"] == str(tmp_path / "images/7.jpg")


def test_vqa_rad_as_it_is_published(tmp_path: Path):
    image = write(tmp_path / "VQA_RAD Image Folder/synpic1.jpg", "")
    first, second = rows(write(tmp_path / "VQA_RAD Dataset Public.json", RAD))
    assert first == {
        "image": str(image),
        "question": "Is it axial?",
        "answer": "Yes",
        "kind": "closed",
        "split": "train",
        "line": 1,
        "metric": "vqa_rad",
    }
    assert (second["answer"], second["kind"], second["split"]) == ("4", "open", "test")


def test_vqa_rad_as_jsonl(tmp_path: Path):
    row = {"image": "images/a.jpg", "question": "Where?", "answer": "lung", "answer_type": "OPEN"}
    path = write(tmp_path / "test.jsonl", "\ufeff" + lines(row))
    found = rows(path)[0]
    assert found["kind"] == "open"
    assert "split" not in found
    assert found["image"] == str(tmp_path / "images/a.jpg")
    elsewhere = write(tmp_path / "elsewhere/images/a.jpg", "")
    assert rows(path, tmp_path / "elsewhere")[0]["image"] == str(elsewhere)


@pytest.fixture
def vqa(tmp_path: Path) -> Path:
    questions = [{"image_id": 42, "question": "What color?", "question_id": 420}]
    answers = [{"answer": "net", "answer_id": i} for i in range(9)] + [{"answer": "netting"}]
    annotations = [{"question_id": 420, "image_id": 42, "answer_type": "other", "answers": answers}]
    write(
        tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"data_subtype": "val2014", "data_type": "mscoco", "questions": questions},
    )
    write(
        tmp_path / "v2_mscoco_val2014_annotations.json",
        {"data_subtype": "val2014", "annotations": annotations},
    )
    return tmp_path


def test_vqa_v2_is_found_by_either_file(vqa: Path):
    image = write(vqa / "images/val2014/COCO_val2014_000000000042.jpg", "")
    expected = {
        "image": str(image),
        "question": "What color?",
        "answer": ["net"] * 9 + ["netting"],
        "kind": "other",
        "line": 1,
        "metric": "vqa_accuracy",
    }
    for path in sorted(vqa.glob("*.json")):
        assert rows(path) == [expected]


def test_vqa_v2_without_its_other_file(vqa: Path):
    (vqa / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(
        DataError, match="needs the annotations beside it; put v2_mscoco_val2014_anno"
    ):
        read_benchmark(vqa / "v2_OpenEnded_mscoco_val2014_questions.json")


def test_vqa_v2_with_a_question_without_answers(vqa: Path):
    annotations = vqa / "v2_mscoco_val2014_annotations.json"
    write(annotations, annotations.read_text().replace("420", "421"))
    with pytest.raises(DataError, match=r"questions\.json, row 1: the question has no answers"):
        read_benchmark(annotations)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "image,question,answer\na.jpg,q,a\n"),
        ("a.csv", ""),
        ("a.csv", '"open,quote\n'),
        ("a.jsonl", lines({"messages": []})),
        ("a.jsonl", "[1, 2]\n"),
        ("a.jsonl", "not json\n"),
        ("a.jsonl", ""),
        ("a.json", "[]"),
        ("a.json", "3"),
        ("a.json", '{"questions": [1], "annotations": []}'),
        ("a.json", '{"annotations": [{"image_id": 1, "bbox": []}], "images": []}'),
        ("a.json", '{"set": {"root": "", "annotation": "a.jsonl"}}'),
        ("a.parquet", "no parquet"),
        ("a.txt", PMC_1),
    ],
)
def test_other_files_are_left_to_other_readers(tmp_path: Path, name: str, content: str):
    assert read_benchmark(write(tmp_path / name, content)) is None


def test_what_is_no_text_file_is_left_to_other_readers(tmp_path: Path):
    assert read_benchmark(tmp_path) is None
    assert read_benchmark(tmp_path / "missing.csv") is None
    for name in ("a.csv", "a.jsonl", "a.json"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00\x80")
        assert read_benchmark(tmp_path / name) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", PMC_1.replace(",B\n", ",E\n"), "line 2: the answer 'E' is none of the choices"),
        ("a.csv", PMC_2.replace("H&E", ""), "line 4: the answer 'A' is none of the choices"),
        ("a.csv", PMC_2.replace(" What stain?", ""), "line 4: Question is empty"),
        ("a.csv", PMC_2.replace("One line.", "Two, cells"), "line 4: there are 11 cells for 10 columns"),
        ("a.csv", WEBSRC.replace("mo040009941265", "page 1"), "line 2: the id 'page 1' is not of"),
        ("a.csv", WEBSRC.replace(",yes,", ",,"), "line 2: answer is empty"),
        ("a.jsonl", lines(cuisine(), cuisine(multi_choice_answer=6)), "line 2: the answer 6 is none"),
        ("a.jsonl", lines(cuisine(multi_choice_prompt="What?")), "line 1: the answer 2 is none of"),
        ("a.jsonl", lines(cuisine(answer=None)), "line 1: answer is missing"),
        ("a.jsonl", lines(cuisine(image_url=[])), "line 1: image_url is not text"),
        ("a.jsonl", lines(cuisine()) + "\n{broken", "line 3: this is not JSON"),
        ("a.jsonl", lines(cuisine(), [1]), "line 2: this is not an object"),
        ("a.json", [RAD[0], {**RAD[1], "answer_type": "YES"}], "row 2: answer_type is 'yes', neither"),
        ("a.json", [RAD[0], {**RAD[1], "answer": float("nan")}], "row 2: answer is not text"),
        ("a.json", [RAD[0], None], "row 2: this is not an object"),
        ("a.json", [RAD[0], {**RAD[1], "answer": 4.0}], "row 2: answer is the number 4.0, which may"),
        ("a.json", [RAD[0], {**RAD[1], "answer": True}], "row 2: answer is not text"),
        ("a.json", [RAD[0], {**RAD[1], "answer": ["4"]}], "row 2: answer is not text"),
        ("a.jsonl", lines(RAD[0], {**RAD[1], "question": None}), "line 2: question is missing"),
        ("a.csv", WEBSRC.replace("answer,element_id", "id,element_id"), None),
        ("a.csv", WEBSRC.replace("answer_start", "answer"), "line 1: there are two columns 'answer'"),
        ("a.csv", PMC_1.replace("A:Diffuse uptake", "A: Focal uptake ").replace(",Answer_label", "")
         .replace(",B\n", "\n"), "line 2: the answer 'Focal uptake' is none of the choices"),
        ("a.csv", PMC_1.replace(",Answer_label", "").replace(",B\n", "\n").replace("Focal uptake, A", "B, A")
         .replace("C:None", "C: B"), "line 2: the answer 'B' is one choice's letter and another's text"),
        ("a.jsonl", lines({"qa_id": 7, "question": "q", "options": ["a", None], "mcq_answer_index": 0,
                           "answer": "a", "image_path": "a.png"}), "line 1: an option is not text"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_named(tmp_path: Path, name: str, content: Any, message: str | None):
    path = write(tmp_path / name, content)
    if message is None:  # not the benchmark's columns
        assert read_benchmark(path) is None
        return
    with pytest.raises(DataError) as error:
        read_benchmark(path)
    assert str(error.value).startswith(f"{path}, {message}")
    assert str(error.value).endswith(" or remove it.")


@pytest.mark.parametrize(
    "answer", ["1.50", "007", "NA", "None", "nan", "2024-01-02", "True", "1e3"]
)
def test_answers_are_the_texts_of_the_file(tmp_path: Path, answer: str):
    row = {**RAD[1], "answer": answer}
    assert rows(write(tmp_path / "a.json", [row]))[0]["answer"] == answer
    assert rows(write(tmp_path / "a.jsonl", lines(row)))[0]["answer"] == answer
    table = f"id,question,answer,element_id\nmo040009941265,What?,{answer},1\n"
    assert rows(write(tmp_path / "dataset.csv", table))[0]["answer"] == answer


def test_numbers_keep_the_digits_of_the_file(tmp_path: Path):
    row = lines({**RAD[1], "answer": 0}).replace('"answer": 0', '"answer": 2.50')
    assert rows(write(tmp_path / "a.jsonl", row))[0]["answer"] == "2.50"
    assert rows(write(tmp_path / "b.jsonl", lines({**RAD[1], "answer": 40})))[0]["answer"] == "40"


def test_answers_that_a_table_has_turned_are_refused(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kept = [{**row, "answer_type": str(row["answer_type"])} for row in RAD]
    for answers, wrong in (([1.0, None], "the number 1.0"), ([2.5, 1.0], "the number 2.5")):
        table = [{**row, "answer": answer} for row, answer in zip(kept, answers)]
        parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=f"row 1: answer is {wrong}"):
            read_benchmark(tmp_path / "a.parquet")


def test_a_choice_may_be_nought(tmp_path: Path):
    row = {"Figure_path": "a.jpg", "Question": "How many?", "Answer": "A", "Choice A": 0, "Choice B": 1,
           "Choice C": None, "Choice D": float("nan")}  # fmt: skip
    assert rows(write(tmp_path / "a.jsonl", lines(row)))[0]["options"] == {"A": "0", "B": "1"}


def test_worldcuisines_without_ids_shares_no_answers(tmp_path: Path):
    path = write(
        tmp_path / "a.jsonl", lines(cuisine(qa_id=None), cuisine(qa_id=None, answer="Okpa"))
    )
    assert [r["answer"] for r in rows(path) if r["kind"] == "open"] == ["Moin moin", "Okpa"]


def test_what_most_people_said_is_trained_on(vqa: Path):
    annotations = vqa / "v2_mscoco_val2014_annotations.json"
    said = ["web", "net", "net", "mesh", "net", "web", 3, "net", "web", "net"]
    content = json.loads(annotations.read_text())
    content["annotations"][0]["answers"] = [{"answer": answer} for answer in said]
    write(annotations, content)
    [row] = rows(annotations)
    assert row["answer"] == ["net"] * 5 + ["web"] * 3 + ["mesh", "3"]
    for broken in (None, [], ["net"], [{"answer": None}]):
        content["annotations"][0]["answers"] = broken
        with pytest.raises(DataError, match=r"questions\.json, row 1: "):
            read_benchmark(write(annotations, content))


def test_images_stay_in_their_folder(tmp_path: Path):
    for name in ("../secret.jpg", "/etc/passwd", "https://x/a.jpg", "images/../../a.jpg"):
        row = {"image": name, "question": "?", "answer": "a", "answer_type": "OPEN"}
        with pytest.raises(DataError, match=r"a\.jsonl, line 1: the image .* (outside|address)"):
            read_benchmark(write(tmp_path / "a.jsonl", lines(row)))


def test_images_in_the_rows_themselves(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = {"image": {"bytes": b"content", "path": "a.jpg"}, "question": "?", "answer": "a",
           "answer_type": "OPEN"}  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet")[0]["image"] == b"content"


def test_a_folder_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image = write(tmp_path / "data/images/a.jpg", "")
    row = {"image": "a.jpg", "question": "?", "answer": "a", "answer_type": "OPEN"}
    write(tmp_path / "data/a.jsonl", lines(row))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert rows(Path("../data/a.jsonl"))[0]["image"] == str(image)


@pytest.mark.parametrize(
    "changes",
    [{"answer_type": "free-form"}, {"answer_type": 3}, {"messages": []}, {"conversations": []}],
)
def test_a_table_of_ones_own_is_no_benchmark(tmp_path: Path, changes: dict[str, Any]):
    row = {"image": "a.jpg", "question": "?", "answer": "a", "answer_type": "OPEN", **changes}
    assert read_benchmark(write(tmp_path / "a.jsonl", lines(row))) is None


def test_what_a_file_is_taken_for_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows(write(tmp_path / "a.json", RAD))
    assert "is read as VQA-RAD, judging by its columns" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("split", "expected"), [("train", ["Yes"]), ("test", ["4"]), ("", ["4"])])
def test_train_and_test_of_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, expected: list[str]
):
    path = write(tmp_path / "a.json", RAD)
    examples = load_examples(visual_options(dataset=str(path)), str(path), split)
    assert [example.references[0] for example in examples] == expected
    assert "holds 1 train and 1 test rows" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(DataError, match="no rows of split 'validation'"):
        load_examples(visual_options(dataset=str(path)), str(path), "validation")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_later_row_in_another_encoding(tmp_path: Path, encoding: str):
    first, second = lines(RAD[0]).encode(), lines({**RAD[1], "answer": "café"}).encode(encoding)
    (tmp_path / "a.jsonl").write_bytes(first + second)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: this is (not in UTF-8|no JSON)"):
        read_benchmark(tmp_path / "a.jsonl")
    many = WEBSRC + "mo040006527817,a?,yes,1,1\n" * 5000
    table = many.encode() + "mo040006527817,café?,yes,1,1\n".encode("latin-1")
    (tmp_path / "a.csv").write_bytes(table)
    with pytest.raises(DataError, match="this is not in UTF-8"):
        read_benchmark(tmp_path / "a.csv")
