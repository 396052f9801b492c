"""Visual data as people have it: what each form becomes, and what is said when it is broken."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vlm_stage_options import visual_options

import emloc
from emloc.errors import ConfigError, DataError
from emloc_vlm.encode import collate
from emloc_vlm.processor import load_processor
from emloc_vlm.rows import load_examples, mixed_examples, readable


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name, size in (("a", (20, 12)), ("b", (40, 15))):
        Image.new("RGB", size, "red").save(tmp_path / f"pictures/{name}.png")
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(path, **options):
    options = visual_options(dataset=str(path), **options)
    return load_examples(options, str(path))


def shape(example):
    """Roles and content, with images as `*`."""
    return [
        (turn["role"], "".join(p.get("text", "*") for p in turn["content"]))
        for turn in example.messages
    ]


def test_transformers_chats(folder):
    inside = {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "this "},
                                     {"type": "image", "path": "pictures/a.png"},
                                     {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "red"}]}  # fmt: skip
    beside = {"messages": [{"role": "user", "content": "what?"},
                           {"role": "assistant", "content": [{"type": "text", "text": "red"}]}],
              "images": ["pictures/a.png", "pictures/b.png"]}  # fmt: skip
    first, second = only(write(folder / "d.jsonl", [inside, beside]))
    assert shape(first) == [("user", "this *?"), ("assistant", "red")]
    assert shape(second) == [("user", "**what?"), ("assistant", "red")]
    assert [image.open().size for image in second.images] == [(20, 12), (40, 15)]
    assert first.references == ("red",)


def test_internvl_meta_file(folder, monkeypatch):
    rows = [
        {"id": n, "image": "a.png", "conversations": [
            {"from": "human", "value": f"<image>\nquestion {n}"}, {"from": "gpt", "value": "yes"}]}
        for n in range(4)
    ]  # fmt: skip
    several = {"image": ["a.png", "b.png"], "conversations": [
        {"from": "human", "value": "one <image> two <image>"}, {"from": "gpt", "value": "no"}]}  # fmt: skip
    write(folder / "one.jsonl", rows)
    write(folder / "two.jsonl", [several])
    meta = folder / "meta.json"
    meta.write_text(json.dumps({
        "one": {"root": "pictures", "annotation": "one.jsonl", "repeat_time": 2.5},
        "two": {"root": "pictures", "annotation": "two.jsonl", "repeat_time": 1,
                "data_augment": False, "length": 1},
    }))  # fmt: skip
    examples = only(meta)
    assert len(examples) == 2 * 4 + 2 + 1
    assert shape(examples[0])[0] == ("user", "*question 0")
    assert shape(examples[-1])[0] == ("user", "one * two *")
    assert all(image.open() for image in examples[-1].images)
    monkeypatch.setattr("emloc_vlm.rows.MOST_ROWS", 7)
    with pytest.raises(DataError, match=r"one repeats 4 rows 2.5 times, which makes more than 7;"):
        only(meta)
    meta.write_text(json.dumps({"x": {"root": ".", "annotation": "gone.jsonl"}}))
    with pytest.raises(DataError, match=r"x names the annotation .*gone.jsonl"):
        only(meta)


def test_a_table_in_three_formats_and_a_column_map(folder):
    rows = [{"image": "pictures/a.png", "question": "colour?", "answer": "red"}]
    write(folder / "t.jsonl", rows)
    (folder / "t.json").write_text(json.dumps(rows))
    (folder / "t.csv").write_text("picture,query,answer\npictures/a.png,colour?,red\n")
    from datasets import Dataset
    from datasets import Image as ImageFeature

    table = Dataset.from_list([{**rows[0], "image": str(folder / "pictures/a.png")}])
    table.cast_column("image", ImageFeature()).to_parquet(folder / "t.parquet")
    mapped = {"column_map": {"picture": "image", "query": "question"}}
    for name, options in (("t.jsonl", {}), ("t.json", {}), ("t.csv", mapped), ("t.parquet", {})):
        [example] = only(folder / name, **options)
        assert shape(example) == [("user", "*colour?"), ("assistant", "red")]
        assert example.images[0].open().size == (20, 12)


def test_image_folder(folder):
    path = write(folder / "t.jsonl", [{"image": "a.png", "question": "?", "answer": "x"}])
    [example] = only(path, image_folder=folder / "pictures")
    assert example.images[0].open()


@pytest.mark.parametrize("problem", ["missing", "corrupt", "truncated"])
def test_a_bad_image_names_file_and_line(folder, problem):
    rows = [{"image": f"pictures/{n}.png", "question": "?", "answer": "x"} for n in "ab"]
    path = write(folder / "t.jsonl", [*rows, {**rows[0], "image": "pictures/c.png"}])
    if problem == "corrupt":
        (folder / "pictures/c.png").write_text("not an image")
    elif problem == "truncated":
        whole = (folder / "pictures/a.png").read_bytes()
        (folder / "pictures/c.png").write_bytes(whole[: len(whole) // 2])
    examples = only(path)
    with pytest.raises(DataError, match=r"t.jsonl, line 3: .*c.png"):
        readable(examples, visual_options())
    assert len(readable(examples, visual_options(on_bad_image="skip"))) == 2


def test_skipping_is_counted_in_the_stages(tiny, tmp_path, capfd):
    lines = tiny.data.read_text().splitlines()
    (tmp_path / "t.jsonl").write_text(
        "\n".join([lines[0].replace("train-000", "gone"), *lines[1:]])
    )
    options = {"dataset": str(tmp_path / "t.jsonl"), "image_folder": str(tiny.root),
               "max_length": 96}  # fmt: skip
    with pytest.raises(DataError, match=r"line 1: there is no image .*gone.png"):
        emloc.train(output_dir=tmp_path / "a", **{**tiny.train_options, **options})
    emloc.train(
        output_dir=tmp_path / "a", on_bad_image="skip",
        **{**tiny.train_options, **options, "max_steps": 1},
    )  # fmt: skip
    assert "1 of 24 samples are skipped" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "line 1 has the columns text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "must end with the assistant"),
        ({"image": "https://x/y.png", "question": "?", "answer": "x"}, "download it first"),
        ({"image": ["a", "b"], "conversations": [{"from": "human", "value": "<image>"},
          {"from": "gpt", "value": "x"}]}, "1 places for images, but 2 images"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "a turn from 'alien'"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "type 'sound'"),
    ],
)  # fmt: skip
def test_malformed_rows_name_file_and_line(folder, row, message):
    with pytest.raises(DataError, match=message):
        only(write(folder / "t.jsonl", [row]))


def test_a_column_map_to_nothing_we_know_is_refused(folder):
    path = write(folder / "t.jsonl", [{"image": "pictures/a.png", "question": "?", "answer": "x"}])
    with pytest.raises(ConfigError, match="maps question to query, which is none of"):
        only(path, column_map={"question": "query"})


def test_mixed_by_weights(folder):
    for name, count in (("x", 6), ("y", 2)):
        write(folder / f"{name}.jsonl",
              [{"image": "pictures/a.png", "question": name, "answer": "z"}] * count)  # fmt: skip
    names = f"{folder / 'x.jsonl'},{folder / 'y.jsonl'}"
    mixed = mixed_examples(visual_options(dataset=names, dataset_weights=[1, 1]), seed=0)
    asked = [shape(example)[0][1] for example in mixed]
    assert asked.count("*x") == asked.count("*y") == 6


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.text("ab?", min_size=1, max_size=9)), min_size=1,
             max_size=3),
    st.booleans(),
)  # fmt: skip
def test_what_a_batch_learns_is_the_answers(tiny, turns, every):
    """Labels decode to the answers; images stand where the marks were; padding has no loss."""
    processor = load_processor(tiny.base)
    chat, images = [], 0
    for count, words in turns:
        content = [{"type": "image", "image": "train-000.png"}] * count
        images += count
        chat.append({"role": "user", "content": [*content, {"type": "text", "text": words}]})
        chat.append({"role": "assistant", "content": f"answer {words}"})
    short = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    path = write(tiny.root / "property.jsonl", [{"messages": chat}, {"messages": short}])
    options = visual_options(dataset=str(path), max_length=2000, assistant_only_loss=every)
    batch = collate(load_examples(options, str(path)), processor, options)
    learnt = batch["labels"][0]
    text = processor.tokenizer.decode(learnt[learnt >= 0])
    answers = [f"answer {words}<|im_end|>\n" for _, words in (turns if every else turns[-1:])]
    assert text == "".join(answers)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    tokens = int((batch["input_ids"] == processor.image_token_id).sum())
    assert tokens == 4 * len(batch.get("pixel_values", []))
    assert math.isclose(tokens / 4, images * (tokens / 4 / images if images else 0))


def test_too_long_a_prompt_is_refused(tiny):
    options = visual_options(dataset=str(tiny.data), max_length=20)
    examples = load_examples(options, str(tiny.data))
    with pytest.raises(DataError, match=r"line 1: its prompt and images take \d+ tokens"):
        collate(examples[:1], load_processor(tiny.base), options)


def test_streaming_and_packing_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="for text"):
        emloc.train(output_dir=tmp_path / "a", packing=True, **tiny.train_options)


def test_evaluation_scores_by_the_metric(tiny, tmp_path):
    answers = [*["yes", "YES", "no"] * 3, "yes"]
    rows = [{"image": "train-000.png", "question": "yes?", "answer": answers}]
    path = write(tiny.root / "ten.jsonl", rows)
    found = emloc.evaluate(
        model_name_or_path=str(tiny.base), dataset=str(path), metric="vqa_accuracy", max_length=96,
        max_new_tokens=3, output_dir=tmp_path / "scores",
    )  # fmt: skip
    assert found["metric"] == "vqa_accuracy"
    assert 0 <= found["vqa_accuracy"] <= 1
    assert json.loads((tmp_path / "scores/evaluation.json").read_text())["samples"] == 1


def test_marks_in_the_entries_of_a_list_are_places_as_in_a_string(folder):
    words = "First <image> and second <image>: which?"
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}],
         "images": ["pictures/a.png", "pictures/b.png"]}
        for content in (words, [{"type": "text", "text": words}])
    ]  # fmt: skip
    plain, listed = only(write(folder / "d.jsonl", rows))
    assert (
        shape(listed)
        == shape(plain)
        == [("user", "First * and second *: which?"), ("assistant", "b")]
    )


def test_a_picture_in_two_columns_is_refused(folder):
    row = {"image": "pictures/a.png", "images": ["pictures/a.png"], "question": "?", "answer": "x"}
    with pytest.raises(DataError, match="columns image and images both name 'pictures/a.png'"):
        only(write(folder / "d.jsonl", [row]))


def test_what_a_meta_file_says_in_vain_is_told(folder, capsys):
    row = {"image": "a.png", "question": "?", "answer": "x"}
    write(folder / "one.jsonl", [row])
    entry = {"root": "pictures", "annotation": "one.jsonl", "length": 1, "data_augment": False}
    (folder / "meta.json").write_text(json.dumps({"one": {**entry, "max_dynamic_patch": 2}}))
    only(folder / "meta.json", max_dynamic_patch=2)
    assert "not used" not in capsys.readouterr().err
    only(folder / "meta.json")
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "one also has max_dynamic_patch=2, which is not used; max_dynamic_patch is one option"
        in said
    )
