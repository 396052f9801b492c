"""Visual chats: the forms of language models with the same code, and tokens as the processor gives them."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_vlm_architectures import TEMPLATE, idefics, llava, qwen
from transformers import Idefics2Processor, MllamaProcessor
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

import emloc
from emloc.config import EvaluateConfig, TrainConfig
from emloc.errors import CheckpointError, DataError
from emloc.extend.plugin_options import with_plugin_options
from emloc.extend.plugins import family_named
from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
from emloc_vlm.encode import answer_words, collate, references_of
from emloc_vlm.evaluation import _answered, _as_words
from emloc_vlm.example import example_processor, write_model
from emloc_vlm.processor import load_processor
from emloc_vlm.rows import load_examples
from emloc_vlm.scoring import METRICS


def test_what_a_template_writes_before_an_answer_is_not_compared(tmp_path):
    """A model that thinks nothing and answers as it was taught is right."""
    options = dict(family_named("vlm").write_example(tmp_path, seed=0))
    model = Path(options["model_name_or_path"])
    template = model / "chat_template.jinja"
    begins = "{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    head = "{{ '<|im_start|>' + message['role'] + '\n' }}"
    written = template.read_text()
    assert head in written
    template.write_text(written.replace(head, head + begins))
    config = with_plugin_options(EvaluateConfig)(
        model_name_or_path=str(model), dataset=options["dataset"]
    )
    processor = load_processor(model, 1)
    example = load_examples(config, options["dataset"])[0]
    [reference] = references_of(example, processor, config)
    reader = answer_words(example, processor, config)
    assert reader.before == "<think>\n\n</think>\n\n"
    for generated, right in (
        (f"<think>\n\n</think>\n\n{reference}", True),
        (f"<think>\nhm\n</think>\n\n{reference}", True),
        ("<think>\n\n</think>\n\nsomething else", False),
    ):
        answer = _as_words(_answered(example, [reference], generated), reader)
        assert METRICS["exact_match"].score(answer)["exact_match"] == right


def idefics2():
    tokenizer = byte_tokenizer(image_token="<image>", end="<end_of_utterance>",
                               image_boundary_token="<fake_token_around_image>")  # fmt: skip
    images = Idefics2ImageProcessorPil(
        size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False
    )
    return Idefics2Processor(
        image_processor=images, tokenizer=tokenizer, image_seq_len=4,
        chat_template=TEMPLATE.format(image="<image>"),
    )  # fmt: skip


def mllama():
    tokenizer = byte_tokenizer(image_token="<|image|>", bos_token="<|begin_of_text|>")
    images = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=2)
    return MllamaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        chat_template=TEMPLATE.format(image="<|image|>"),
    )


PROCESSORS = {
    "internvl": example_processor(16, 4),
    "llava": llava()[1],
    "qwen": qwen()[1],
    "idefics3": idefics()[1],
    "idefics2": idefics2(),
    "mllama": mllama(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("chats")
    for name, size in (("a", (20, 12)), ("b", (40, 15))):
        Image.new("RGB", size, "red").save(made / f"{name}.png")
    return made


def options(**more):
    return with_plugin_options(TrainConfig)(output_dir="o", max_length=2000, **more)


def read(folder, row, **more):
    path = folder / "d.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return load_examples(options(**more), str(path))[0]


def learnt(batch, processor):
    labels = batch["labels"][0]
    return processor.tokenizer.decode(labels[labels >= 0])


PARTS = st.lists(st.sampled_from([*"ab"]) | st.text("red \n?<", min_size=1, max_size=6), min_size=1,
                 max_size=3)  # fmt: skip


ANSWERS = st.text("red \n", min_size=1, max_size=5)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(list(PROCESSORS)), st.booleans(),
       st.lists(st.tuples(PARTS, ANSWERS), min_size=1, max_size=3))  # fmt: skip
def test_tokens_are_the_processors_and_labels_the_answers(folder, kind, every, turns):
    processor = PROCESSORS[kind]
    messages, stock = [], []
    for parts, answer in turns:
        content = [
            {"type": "image", "image": f"{part}.png"} if part in ("a", "b")
            else {"type": "text", "text": part}
            for part in parts
        ]  # fmt: skip
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        opened = [
            {**part, "image": Image.open(folder / part["image"])} if "image" in part else part
            for part in content
        ]
        stock += [{"role": "user", "content": opened},
                  {"role": "assistant", "content": [{"type": "text", "text": answer}]}]  # fmt: skip
    example = read(folder, {"messages": messages})
    chosen = options(assistant_only_loss=every)
    try:
        batch = collate([example], processor, chosen)
    except DataError:  # where a processor does not say what it put for images
        assert (kind, every) == ("idefics2", True)
        return
    expected = processor.apply_chat_template(
        stock, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(batch[name], tensor)
    answers = [f"{answer}<|im_end|>\n" for _, answer in (turns if every else turns[-1:])]
    assert learnt(batch, processor) == "".join(answers)
    asked = collate([example], processor, chosen, answers=False)
    prompt = processor.apply_chat_template(
        stock[:-1], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert asked["input_ids"].tolist() == prompt["input_ids"].tolist()
    assert (
        asked["input_ids"][0].tolist()
        == batch["input_ids"][0, : asked["input_ids"].shape[1]].tolist()
    )


def test_a_mark_on_its_own_line_takes_the_line_and_nothing_else(folder):
    def said(text, images=1):
        row = {"image": ["a.png"] * images, "conversations": [{"from": "human", "value": text},
               {"from": "gpt", "value": " red\n"}]}  # fmt: skip
        question, answer = read(folder, row).messages
        assert answer["content"] == [{"type": "text", "text": " red\n"}]
        return "".join(part.get("text", "*") for part in question["content"])

    assert said("<image>\nColour?\n") == "*Colour?\n"
    assert said("<image>\n\nColour?") == "*\nColour?"
    assert said("<image>Colour?\n\n") == "*Colour?\n\n"
    assert said("Colour?\n<image>") == "Colour?*"
    assert said("a\n<image>\nb") == "a\n*b"
    assert said("a <image>\nb") == "a *\nb"
    assert said("<image>\n<image>\nb", 2) == "**b"
    assert said("<image>\r\nb") == "*b"


def test_every_form_of_a_language_model(folder):
    image = {"image": "a.png"}
    expected = read(folder, {**image, "messages": [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "Colour?"},
        {"role": "assistant", "content": "red"}]})  # fmt: skip
    share = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "red"}]
    user = [{"role": "user", "content": "Colour?"}]
    for row in (
        {"conversations": share}, {"conversations": json.dumps(share)},
        {"question": "Colour?", "answer": "red"},
        {"instruction": "Colour?", "input": "", "output": "red"}, {"prompt": user, "completion": "red"},
        {"prompt": json.dumps(user), "completion": "red"},
    ):  # fmt: skip
        found = read(folder, {**image, **row, "system": "be brief"})
        assert found.messages == expected.messages
        assert (found.images, found.references) == (expected.images, expected.references)
    assert expected.messages[1]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "Colour?"},
    ]
    with pytest.raises(DataError, match="are plain text; name them question and answer"):
        read(folder, {**image, "prompt": "Colour?", "completion": "red"})


def test_tools_reach_the_template(folder):
    call = {"name": "find", "arguments": {"q": "red", "n": None}}
    tools = [{"type": "function", "function": {"name": "find"}}]
    question = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "look"}]
    row = {"tools": tools, "messages": [{"role": "user", "content": question}, {"role": "assistant",
           "content": None, "tool_calls": [{"type": "function", "function": call}]}]}  # fmt: skip
    example = read(folder, row)
    processor = example_processor(16, 4)
    with pytest.raises(DataError, match="line 1: turn 2 calls a tool"):
        collate([example], processor, options())
    end = "{{ '<|im_end|>"
    calls = "{% for c in message.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    shown = processor.chat_template.replace(end, calls + end)
    processor.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + shown
    batch = collate([example], processor, options())
    assert learnt(batch, processor) == f"{json.dumps(call)}<|im_end|>\n"
    assert references_of(example, processor, options()) == [json.dumps(call)]
    share = [
        {"from": "human", "value": "<image>look"},
        {
            "from": "function_call",
            "value": json.dumps({**call, "arguments": json.dumps(call["arguments"])}),
        },
    ]
    other = read(folder, {"image": "a.png", "tools": json.dumps(tools), "conversations": share})
    assert (
        collate([other], processor, options())["input_ids"].tolist() == batch["input_ids"].tolist()
    )


def test_tables_keep_their_images_whatever_wrote_them(folder):
    table = "image,question,answer\r\na.png,How many?,007\r\n"
    for name, encoding in (("plain.csv", "utf-8"), ("excel.csv", "utf-8-sig")):
        (folder / name).write_bytes(table.encode(encoding))
        [example] = load_examples(options(), str(folder / name))
        assert example.references == ("007",)
        assert example.images[0].open().size == (20, 12)
    whole = {"image": "a.png", "question": "How many?", "answer": 3}
    assert read(folder, whole).references == ("3",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image_path": "a.png", "question": "?", "answer": "x"}, "column_map image_path=image"),
        ({"img": "a.png", "question": "?", "answer": "x"}, "column img seems to hold an image"),
        ({"file": "a.png", "question": "?", "answer": "x"}, "column file seems to hold an image"),
        ({"shown": {"bytes": "x", "path": "y"}, "question": "?", "answer": "x"}, "column shown"),
        ({"image": "a.png", "question": "?", "answer": None}, "has the columns answer, image, question"),
        ({"image": "a.png", "question": 5, "answer": "x"}, "question is a number"),
        ({"image": "a.png", "question": "?", "answer": {"a": 1}}, "answer is an object"),
        ({"image": "a.png", "question": "?", "answer": "x", "options": ["x"]}, "options should be an object"),
        ({"image": True, "question": "?", "answer": "x"}, "an image entry is True"),
        ({"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": None}]},
         "turn 2 of conversations has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "a text entry of the content of turn 1 of messages is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "s3://a/b"}}]},
                       {"role": "assistant", "content": "x"}]}, "is an address"),
    ],
)  # fmt: skip
def test_malformed_rows_name_the_line(folder, row, message):
    with pytest.raises(DataError, match=rf"d.jsonl, line 1.*{message}"):
        read(folder, row)


def test_meta_files_name_what_is_beside_them(folder, tmp_path, monkeypatch):
    row = {"image": "a.png", "question": "?", "answer": "x"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    meta = folder / "meta.json"

    def write(**entry):
        meta.write_text(json.dumps({"x": {"annotation": "rows.jsonl", **entry}}))
        return load_examples(options(), str(meta))

    assert write()[0].images[0].open()
    assert write(root=str(folder))[0].images[0].open()
    for wrong in (
        {"root": "/etc"}, {"root": "../.."}, {"annotation": str(tmp_path / "rows.jsonl")},
        {"root": "s3://bucket"}, {"root": 3}, {"repeat_time": "x"}, {"repeat_time": -1},
    ):  # fmt: skip
        with pytest.raises(DataError, match=r"meta.json: x (names|has)"):
            write(**wrong)
    monkeypatch.chdir(tmp_path)  # the working folder is where InternVL's own names begin
    assert write(annotation=str(tmp_path / "rows.jsonl"))[0].where.startswith(str(tmp_path))
    os.symlink("/etc/hostname", folder / "linked.jsonl")
    with pytest.raises(DataError, match="is a link that leads out of"):
        write(annotation="linked.jsonl")


def test_folders_of_pictures_are_read_with_their_metadata(folder, tmp_path):
    Image.new("RGB", (20, 12), "red").save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,question,answer\na.png,How many?,007\n")
    [example] = load_examples(options(), str(tmp_path))
    assert example.references == ("007",)
    assert example.images[0].open().size == (20, 12)
    for name in ("https://x.invalid/a.png", "../a.png"):
        (tmp_path / "metadata.csv").write_text(f"file_name,question,answer\n{name},?,x\n")
        with pytest.raises(DataError, match=r"metadata.csv, line 2: the image .*(address|outside)"):
            load_examples(options(), str(tmp_path))


def test_added_tokens_without_rows_are_named(folder, tmp_path):
    base = write_model(tmp_path / "m")
    processor = example_processor(16, 4)
    processor.tokenizer.add_tokens(["<think>"])
    processor.save_pretrained(base)
    read(folder, {"image": "a.png", "question": "?", "answer": "<think>x"})
    for stage in (emloc.compress, emloc.train, emloc.evaluate):
        with pytest.raises(CheckpointError, match="gives '<think>' the id"):
            stage(
                model_name_or_path=str(base),
                dataset=str(folder / "d.jsonl"),
                output_dir=tmp_path / "o",
            )


def test_a_template_for_text_alone_is_refused(folder):
    processor = example_processor(16, 4)
    processor.chat_template = processor.tokenizer.chat_template  # writes what it is given
    example = read(folder, {"question": "Colour?", "answer": "red"})
    with pytest.raises(CheckpointError, match="line 1: .*takes only text"):
        collate([example], processor, options())


def test_a_column_that_names_a_row_is_no_image(tmp_path):
    """Text-only rows of mixed data keep their identifiers."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"image_id": "123", "id": "123.jpg", "question": "2+2?", "answer": "4"},
        {"image_width": 3, "question": "2+3?", "answer": "5"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    examples = load_examples(options(dataset=str(path)), str(path))
    assert [len(example.images) for example in examples] == [0, 0]


def test_a_template_that_leaves_out_a_part_of_the_answer_is_refused(folder):
    processor = example_processor(16, 4)
    text = "part['text']"
    assert text in processor.chat_template
    processor.chat_template = processor.chat_template.replace(
        text, f"({text}.split('</think>')[-1])"
    )
    row = {"image": "a.png", "question": "Colour?", "answer": "red"}
    assert learnt(collate([read(folder, row)], processor, options()), processor).startswith("red")
    example = read(folder, {**row, "answer": "<think>it glows</think>red"})
    with pytest.raises(DataError, match="line 1: .*leaves out 'it glows' of turn 2"):
        collate([example], processor, options())
