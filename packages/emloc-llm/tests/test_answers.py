"""A model that says what it was taught is right, whatever its template writes around the words."""

import re
from pathlib import Path

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st

from emloc.config import TrainConfig
from emloc.errors import DataError
from emloc.extend.plugin_options import with_plugin_options
from emloc.integrations.transformers import chat
from emloc.integrations.transformers.answers import AnswerWords, words_of
from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
from emloc_llm.data import encode
from emloc_llm.evaluation import _scored

TEMPLATES = {
    path.stem: path.read_text()
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if not re.search(r"vl|llava|idefics", path.stem)
}
SPECIAL = re.compile(r"<[|｜][^|｜<>\s]{1,40}[|｜]>|<(?!/?think)[a-z_]{2,30}\|?>|<\|[a-z_]{2,30}>")
OPTIONS = with_plugin_options(TrainConfig)(output_dir="o", max_length=100_000)
ANSWERS = [
    "blue",
    '{"colour": ["blue", 1]}',
    "6 * 7 = 42\n#### 42",
    "<think>\nhm\n</think>\n\nblue",
]


def tokenizer_of(template):
    """Marks of the template are special tokens, as in the models' own tokenizers."""
    tokenizer = byte_tokenizer()
    marks = sorted(set(SPECIAL.findall(template)))
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks, "<|im_start|>"]})
    tokenizer.bos_token, tokenizer.chat_template = "<|im_start|>", template
    return tokenizer


def said(sample, tokenizer):
    return tokenizer.decode(
        sample.input_ids[sample.prompt_length :], skip_special_tokens=True
    ).strip()


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_was_taught_is_right_and_something_else_is_not(name):
    tokenizer = tokenizer_of(TEMPLATES[name])
    scored, refused = 0, []
    for answer in ANSWERS:
        for more in ({}, {"reasoning_content": "hm"}):
            turn = {"role": "assistant", "content": answer, **more}
            row = {"messages": [{"role": "user", "content": "Which?"}, turn]}
            try:
                sample = encode(row, tokenizer, OPTIONS)
            except DataError as problem:  # a template that shows no thoughts, for one
                refused.append(str(problem))
                continue
            generated = said(sample, tokenizer)
            entry = _scored(sample, generated, tokenizer, "auto")
            assert entry["match"], (answer, entry)
            assert entry["prediction"] == generated
            wrong = generated.replace("blue", "red").replace("42", "43")
            assert not _scored(sample, wrong, tokenizer, "auto")["match"]
            scored += 1
    assert scored or all(
        "renders a prompt differently once it is answered" in one for one in refused
    )


def test_thoughts_are_not_compared():
    tokenizer = tokenizer_of(TEMPLATES["qwen3"])
    row = {
        "messages": [
            {"role": "user", "content": "Which?"},
            {"role": "assistant", "content": "blue"},
        ]
    }
    sample = encode(row, tokenizer, OPTIONS)
    for generated, right in (
        ("<think>\n\n</think>\n\nblue", True),
        ("<think>\nperhaps red\n</think>\n\nblue", True),
        ("blue", True),
        ("<think>\nblue\n</think>\n\nred", False),
        ("<think>\nblue", False),
    ):
        assert _scored(sample, generated, tokenizer, "auto")["match"] == right, generated


@given(st.text(max_size=30), st.text(max_size=30))
def test_words_are_those_after_the_thoughts(thoughts, words):
    stripped = words.strip()
    if stripped and not re.search("</|<channel|◁|\\[/", thoughts + words):
        assert words_of(f"<think>{thoughts}</think>\n{words}") == stripped
        assert words_of(words) == stripped
        assert AnswerWords("final").in_prediction(f"final{words}") == stripped


@pytest.mark.parametrize(
    ("name", "shown"), [("gemma4", False), ("gptoss", True), ("qwen3", True), ("llama3", False)]
)
def test_thoughts_that_do_not_show_are_said(name, shown, capfd):
    """By what is written: templates mention keys that they show beside calls alone."""
    chat._say_once.cache_clear()
    tokenizer = tokenizer_of(TEMPLATES[name])
    turn = {"role": "assistant", "content": "blue", "reasoning_content": "hm, a colour"}
    sample = encode({"messages": [{"role": "user", "content": "Which?"}, turn]}, tokenizer, OPTIONS)
    assert ("hm, a colour" in tokenizer.decode(sample.input_ids)) == shown
    told = " ".join(capfd.readouterr().err.split())
    assert ("does not show 'reasoning_content' of turns: it is not used" in told) != shown
