"""Training, evaluation and a chat afterwards see the same tokens: those of the template as a whole."""

from pathlib import Path

import pytest
import trl
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import CHATML, TEMPLATES, TOKENIZERS, byte_level
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from emloc.config import TrainConfig
from emloc.errors import DataError
from emloc.extend.plugin_options import with_plugin_options
from emloc.integrations.transformers.tokens import PrefixTokens
from emloc_llm.data import IGNORED, encode

MADE = {name: make() for name, make in TOKENIZERS.items()}
WORDS = st.text(" \n\tab12é🙂.?", min_size=1, max_size=12).filter(str.strip)


def options(**more):
    return with_plugin_options(TrainConfig)(output_dir="o", max_length=4096, **more)


def with_template(tokenizer, template):
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def chat(texts):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(list(MADE)), st.sampled_from(list(TEMPLATES)), st.booleans(),
       st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))  # fmt: skip
def test_a_chats_tokens_are_the_templates(kind, template, every, turns):
    tokenizer = with_template(MADE[kind], template)
    messages = chat([text for pair in turns for text in pair])
    sample = encode({"messages": messages}, tokenizer, options(assistant_only_loss=every))
    assert sample.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert sample.prompt == tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    places = []
    for index in range(1, len(messages), 2) if every else [len(messages) - 1]:
        head = tokenizer.apply_chat_template(
            messages[:index], add_generation_prompt=True, tokenize=False
        )
        through = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        places.append((len(head), len(through)))
    # Whoever tokenises beginnings of the text (as TRL does) finds the same answers, and before them what
    # would be other tokens were it the end of a text.
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    slow = PrefixTokens(tokenizer, whole, False, "here").labels(places, IGNORED)
    assert all(ours in (IGNORED, theirs) for ours, theirs in zip(sample.labels, slow) if not every)
    if sample.prompt == sample.input_ids[: len(sample.prompt)] and not every:
        assert sample.labels == slow
    assert sample.reference == messages[-1]["content"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """What TRL makes of rows, by its own preparation."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=500, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                    num_attention_heads=2)
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("trl")

    def prepared(rows, tokenizer, **more):
        arguments = SFTConfig(
            output_dir=str(folder), report_to=[], use_cpu=True, max_length=None, **more
        )
        trainer = SFTTrainer(
            model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        return [
            (row["input_ids"], row["labels"])
            for row in trainer.train_dataset  # pyright: ignore[reportGeneralTypeIssues]
        ]

    return prepared


def same_as(sample, ids, labels):
    assert sample.input_ids == ids
    if sample.prompt == ids[: len(sample.prompt)]:
        assert sample.labels == labels
    else:  # TRL takes the end of the prompt into the answer, where the two are tokenised differently
        assert [a for a in sample.labels if a != IGNORED] == ids[sample.prompt_length :]
        assert sample.prompt_length >= labels.count(IGNORED)


@pytest.mark.parametrize("kind", list(MADE))
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_prompts_and_completions_are_those_of_trl(stock, kind, template):
    tokenizer = with_template(MADE[kind], template)
    texts = [("what is 12 + 30?", "42"), ("asks", "  return x + 1\n\n"), ("a  ", " b \n"),
             ("yes or no", "no?")]  # fmt: skip
    chats = [{"prompt": chat([a]), "completion": chat(["", b])[1:]} for a, b in texts]
    expected = stock(chats, tokenizer)
    for row, (ids, labels) in zip(chats, expected):
        same_as(encode(row, tokenizer, options()), ids, labels)
    plain = [{"prompt": a, "completion": b} for a, b in texts]
    for row, (ids, labels) in zip(plain, stock(plain, tokenizer)):
        same_as(encode(row, tokenizer, options()), ids, labels)
    texts = [{"text": f"{a}{b}"} for a, b in texts]
    for row, (ids, _) in zip(texts, stock(texts, tokenizer)):
        assert encode(row, tokenizer, options()).input_ids == ids


MARKED = Path(trl.__file__).parent / "chat_templates/qwen2_5_training.jinja"
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
PARTED = {
    "an answer after a chat": (chat(["a?", "b", "c?"]), [chat(["", "d"])[1]]),
    "a chat goes on": (chat(["a?"]), chat(["", "b", "c?", "d"])[1:]),
    "a call and what it gave": (
        chat(["a?"]),
        [
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "seen"},
            {"role": "assistant", "content": "d"},
        ],
    ),
}


@pytest.mark.parametrize("form", PARTED)
@pytest.mark.parametrize("every", [True, False])
def test_completions_of_several_turns_are_learnt_as_trl_learns_them(stock, form, every):
    """All of the completion, or the assistant's words in it, and of the prompt nothing."""
    tokenizer = byte_level()
    tokenizer.chat_template = MARKED.read_text()
    prompt, completion = PARTED[form]
    row = {"prompt": prompt, "completion": completion}
    sample = encode(row, tokenizer, options(assistant_only_loss=every))
    ((ids, labels),) = stock([row], tokenizer, assistant_only_loss=every)
    assert sample.input_ids == ids
    assert sample.labels == labels
    last = sample.input_ids[sample.prompt_length :]
    assert tokenizer.decode(last).startswith("d"), "the last answer is what evaluation asks for"
    # By positions, where the template marks nothing.
    tokenizer.chat_template = CHATML
    if form == "a chat goes on":
        sample = encode(row, tokenizer, options(assistant_only_loss=every))
        learnt = tokenizer.decode([label for label in sample.labels if label != IGNORED])
        assert ("c?" in learnt) == (not every)
        assert learnt.startswith("b")
    with_all = options(assistant_only_loss=True, completion_only_loss=False)
    if form == "an answer after a chat":
        sample = encode(row, tokenizer, with_all)
        learnt = tokenizer.decode([label for label in sample.labels if label != IGNORED])
        assert learnt.startswith("b")


def test_a_completion_begins_with_an_answer():
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    row = {"prompt": chat(["a?", "b"]), "completion": chat(["c?", "d"])}
    with pytest.raises(DataError, match="let it begin with the assistant's turn, or use messages"):
        encode(row, tokenizer, options())


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("end", [True, False])
def test_special_tokens_stand_once(begin, end):
    tokenizer = byte_level(begin=begin, end=end)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = [{"prompt": "a b", "completion": " c"}, {"prompt": "<s>a b", "completion": " c</s>"},
            {"text": "a b c"}, {"text": "<s>a b c</s>"}]  # fmt: skip
    for row, written in zip(rows, (False, True, False, True)):
        sample = encode(row, tokenizer, options())
        assert sample.input_ids.count(eos) == 1
        assert sample.input_ids[-1] == sample.labels[-1] == eos
        assert sample.input_ids.count(bos) == int(begin or written)
        assert eos not in sample.prompt
        assert tokenizer.decode(sample.input_ids, skip_special_tokens=True) == "a b c"
        if "prompt" in row:
            learnt = [label for label in sample.labels if label != IGNORED]
            assert tokenizer.decode(learnt) == " c</s>"
            assert sample.prompt == sample.input_ids[: sample.prompt_length]
    tokenizer.chat_template = TEMPLATES["llama3"]
    assert encode({"messages": chat("ab")}, tokenizer, options()).input_ids.count(bos) == 1


@pytest.mark.parametrize("trim", [True, False])
def test_indentation_is_learnt(trim):
    """A token of spaces alone has no width in the offsets of some tokenizers."""
    tokenizer = byte_level(trim=trim)
    tokenizer.chat_template = CHATML
    code = "    return x\n        + 1"
    messages = [*chat(["code", code, "more"]), {"role": "assistant", "content": code}]
    sample = encode({"messages": messages}, tokenizer, options(assistant_only_loss=True))
    learnt = [label for label in sample.labels if label != IGNORED]
    assert tokenizer.decode(learnt) == f"{code}<|im_end|>\n" * 2


def test_a_word_over_the_prompts_end_is_said(tmp_path, capfd):
    from emloc_llm.data import load_samples

    path = tmp_path / "d.jsonl"
    path.write_text(
        '{"prompt": "answers ", "completion": "yes"}\n{"prompt": "or", "completion": " no"}\n'
    )
    load_samples(options(dataset=str(path)), MADE["byte-level"], 0)
    assert "in 1 of 2 samples of" in " ".join(capfd.readouterr().err.split())


def test_templates_that_mark_answers_agree_with_the_library():
    tokenizer = byte_level(trim=False)  # the library loses answers that begin with trimmed space
    tokenizer.chat_template = CHATML.replace("{{ m.role }}\n", "{{ m.role + '\n' }}").replace(
        "{{ m.content }}<|im_end|>",
        "{%- if m.role == 'assistant' -%}{%- generation -%}{{ m.content }}<|im_end|>{%- endgeneration -%}"
        "{%- else -%}{{ m.content }}<|im_end|>{%- endif -%}",
    )
    messages = chat(["yes or no", "  yes", "and", "no\n\n"])
    found = tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    sample = encode({"messages": messages}, tokenizer, options(assistant_only_loss=True))
    assert sample.input_ids == found["input_ids"]
    marked = [t if m else IGNORED for t, m in zip(found["input_ids"], found["assistant_masks"])]
    assert sample.labels == marked


def test_what_a_template_refuses_or_leaves_out_names_the_row(tmp_path):
    from emloc_llm.rows import load_rows

    tokenizer = with_template(MADE["byte-level"], "gemma")
    path = tmp_path / "d.jsonl"
    path.write_text('{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},'
                    ' {"role": "assistant", "content": "a"}]}\n')  # fmt: skip
    [row] = load_rows(options(dataset=str(path)))
    with pytest.raises(DataError, match=r"d.jsonl, line 1: .*System role not supported"):
        encode(row, tokenizer, options())
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}:{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(DataError, match=r"line 1: .* leaves out turn 1 \(system\)"):
        encode(row, tokenizer, options())
    tokenizer.chat_template = (  # the prompt depends on what comes behind it
        "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last else '…' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(DataError, match="renders a prompt differently once it is answered"):
        encode(row, tokenizer, options())
