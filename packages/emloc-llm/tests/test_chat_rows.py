"""The forms that chats are written in become the same turns, and what is malformed names its line."""

import json

import pytest

from emloc.config import TrainConfig
from emloc.errors import DataError
from emloc.extend.plugin_options import with_plugin_options
from emloc.integrations.transformers import chat
from emloc.integrations.transformers.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer
from emloc.integrations.transformers.data.turns import chat_of
from emloc_llm.data import encode, load_samples

TOKENIZER = byte_tokenizer()
TOOLED = byte_tokenizer()
TOOLED.chat_template = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPTIONS = with_plugin_options(TrainConfig)(output_dir="o")
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"name": "weather", "arguments": {"city": "Rome", "day": None}}
CALLS = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


ASSISTANT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
END = "<|im_end|>\n{% endfor %}" + ASSISTANT
LAST_THOUGHT = (  # R1's distilled models: no thought is shown
    TURNS
    + "{{ (m.content or '').split('</think>')[-1] if m.role == 'assistant' else m.content }}"
    + END
)
CALL_ALONE = (  # Llama 3.1's
    TURNS
    + "{% if 'tool_calls' in m %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}" + END
)
FIRST_CALL = (
    TURNS + "{{ m.content or '' }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
    "{% endif %}" + END
)
USERS_AND_LAST = (
    "{% for m in messages if m.role != 'assistant' or m == messages[-1] %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}" + END
)
MOVED_THOUGHT = (  # Qwen3's: thoughts are set apart, and shown in the last answer alone
    TURNS + "{% if m.role == 'assistant' %}{% set c = (m.content or '').split('</think>') %}"
    "{% if c | length > 1 and loop.last %}{{ '<think>\n' + c[0].split('<think>')[-1].strip('\n')"
    " + '\n</think>\n\n' }}{% endif %}{{ c[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    + END
)


def text(row, tokenizer=TOOLED):
    return tokenizer.decode(encode(row, tokenizer, OPTIONS).input_ids)


def read(tmp_path, row, tokenizer=TOKENIZER):
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    options = with_plugin_options(TrainConfig)(output_dir="o", dataset=str(tmp_path / "d.jsonl"))
    return load_samples(options, tokenizer, 0)[0]


@pytest.mark.parametrize("as_text", [False, True])
def test_calls_of_tools_in_every_form(as_text):
    dump = json.dumps if as_text else lambda value: value
    expected = text(
        {"messages": [USER, CALLS, {"role": "tool", "content": "7"}, ANSWER], "tools": TOOLS}
    )
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Rome", "day": null}}' in expected
    turns = [("human", "q"), ("function_call", dump(CALL)), ("observation", "7"), ("gpt", "a")]
    share = [{"from": speaker, "value": value} for speaker, value in turns]
    for calls in (dump(CALL), dump([CALL])):
        share[1]["value"] = calls
        assert text({"conversations": dump(share), "tools": dump(TOOLS)}) == expected
    older = {"role": "assistant", "content": None, "function_call": CALL}
    flat = {**CALLS, "tool_calls": dump(CALLS["tool_calls"])}
    for turn in (older, flat):
        chat = [USER, turn, {"role": "tool", "content": "7"}, ANSWER]
        assert text({"messages": dump(chat), "tools": dump(TOOLS)}) == expected


def test_a_call_is_compared_as_the_template_writes_it():
    """What a model generates is decoded text, and no row's JSON."""
    for turn in (CALLS, {**CALLS, "content": "Let me see."}):
        sample = encode({"messages": [USER, turn], "tools": TOOLS}, TOOLED, OPTIONS)
        learnt = [label for label in sample.labels if label != -100]
        assert sample.reference == TOOLED.decode(learnt, skip_special_tokens=True).strip()
        assert f"<tool_call>{json.dumps(CALL)}</tool_call>" in sample.reference


def test_arguments_as_json_text_are_an_object():
    expected = text({"messages": [USER, CALLS]})
    written = {**CALL, "arguments": json.dumps(CALL["arguments"])}
    openai = {"role": "assistant", "tool_calls": [{"type": "function", "function": written}]}
    share = {"from": "function_call", "value": json.dumps(written)}
    for row in ({"messages": [USER, openai]}, {"conversations": [{"from": "human", "value": "q"}, share]},
                {"messages": [USER, {"role": "assistant", "function_call": written}]},
                {"messages": json.dumps([USER, openai])}):  # fmt: skip
        assert text(row) == expected
    bare = {**CALL, "arguments": '{"b": 1e3, "a": [null, 2.0]}'}
    calls = {"role": "assistant", "tool_calls": [bare, {**CALL, "arguments": ""}]}
    found = chat_of({"messages": [USER, calls]}, "here").turns[1]["tool_calls"]
    assert json.dumps(found[0]["arguments"]) == '{"b": 1000.0, "a": [null, 2.0]}'
    assert found[1]["arguments"] == {}


def test_turns_as_json_text_in_prompt_and_completion(tmp_path):
    expected = read(tmp_path, {"messages": [USER, ANSWER]})
    share = [{"from": "human", "value": "q"}]
    for prompt, completion in ((json.dumps([USER]), "a"), (json.dumps([USER]), json.dumps([ANSWER])),
                               ([USER], json.dumps([ANSWER])), (json.dumps(share), "a")):  # fmt: skip
        assert read(tmp_path, {"prompt": prompt, "completion": completion}) == expected
    cells = [json.dumps([one]).replace('"', '""') for one in (USER, ANSWER)]
    (tmp_path / "d.csv").write_text('prompt,completion\n"{}","{}"\n'.format(*cells))
    options = with_plugin_options(TrainConfig)(output_dir="o", dataset=str(tmp_path / "d.csv"))
    assert load_samples(options, TOKENIZER, 0) == [expected]
    for plain in (
        '[{"name": "x"}]',
        "[]",
        "[1]",
        '[{"role": "user"',
        "[INST] q",
        '{"role": "user"}',
    ):
        assert text({"prompt": plain, "completion": "a"}, TOKENIZER).startswith(plain)
        assert read(tmp_path, {"prompt": [USER], "completion": plain}).reference == plain


def test_system_history_and_parts():
    system = {"role": "system", "content": "be brief"}
    expected = text({"messages": [system, USER, ANSWER]})
    share = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for row in ({"messages": [USER, ANSWER]}, {"conversations": share}, {"prompt": [USER], "completion": "a"},
                {"prompt": [USER], "completion": [ANSWER]}, {"messages": [system, USER, ANSWER]},
                {"instruction": "q", "input": "", "output": "a"}):  # fmt: skip
        assert text({**row, "system": "be brief"}) == expected
    earlier = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    alpaca = {"instruction": "q", "output": "a", "history": [["x", "y"]]}
    assert text(alpaca) == text({"messages": [*earlier, USER, ANSWER]})
    parts = [{"type": "text", "text": "q"}]
    split = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    sample = encode({"messages": [{**USER, "content": parts}, {**ANSWER, "content": split}]},
                    TOKENIZER, OPTIONS)  # fmt: skip
    assert sample.reference == "a b"
    assert sample == encode({"messages": [USER, {**ANSWER, "content": "a b"}]}, TOKENIZER, OPTIONS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "x"}, "messages is text but not JSON"),
        ({"messages": {"role": "user"}}, "messages should be a list"),
        ({"messages": ["x"]}, "turn 1 of messages is 'x'"),
        ({"messages": [{"content": "q"}, ANSWER]}, "turn 1 of messages has no role"),
        ({"messages": [USER]}, "must end with the assistant"),
        ({"messages": [ANSWER]}, "begins with the assistant's turn"),
        ({"messages": [USER, {"role": "assistant"}]}, "turn 2 of messages has no content"),
        (
            {"messages": [USER, {**ANSWER, "content": {"item": "tea"}}]},
            "turn 2 of messages is an object",
        ),
        ({"messages": [USER, {**ANSWER, "content": 5}]}, "is a number"),
        (
            {"messages": [{**USER, "content": [{"type": "image", "image": "a.png"}]}, ANSWER]},
            "type 'image'",
        ),
        ({"messages": [{**USER, "content": [{"type": "text"}]}, ANSWER]}, "is missing"),
        ({"messages": [USER, ANSWER], "tools": "nope"}, "tools is text but not JSON"),
        ({"messages": [USER, ANSWER], "tools": ["x"]}, "tools should be a list of objects"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "has weight=0"),
        ({"messages": [USER, {**ANSWER, "train": False}]}, "has train=False"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "has weight=0.5"),
        (
            {"messages": [{"role": "system", "content": "x"}, USER, ANSWER], "system": "y"},
            "column system",
        ),
        ({"conversations": ["x"]}, "turn 1 of conversations is 'x'"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "a turn from 'robot'"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": "f()"},
                ]
            },
            "function_call of turn 2 of conversations is text but not JSON",
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [{"function": {"arguments": "f("}}]},
                ]
            },
            "arguments of call 1 of turn 2 of messages is text but not JSON",
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]},
                ]
            },
            "arguments of call 1 of turn 2 of messages should be an object",
        ),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "pair 1 of history"),
        ({"instruction": "q", "output": "a", "history": 5}, "history should be a list"),
        ({"prompt": "q", "completion": "a", "system": "s"}, "column system has no place"),
        ({"prompt": "q", "completion": [ANSWER]}, "completion is a list"),
    ],
)
def test_malformed_chats_name_the_line(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"d.jsonl, line 1.*{message}"):
        read(tmp_path, row)


def test_weights_that_are_the_usual_are_fine(tmp_path):
    plain = read(tmp_path, {"messages": [USER, ANSWER]})
    weighed = [{**USER, "train": False}, {**ANSWER, "weight": 1, "train": True}]
    assert read(tmp_path, {"messages": weighed}) == plain


def test_a_model_without_chats_takes_alpaca_alone_and_says_what_it_cannot(tmp_path):
    plain = byte_tokenizer()
    plain.chat_template = None
    row = {"instruction": "q", "input": "", "output": "a"}
    assert read(tmp_path, row, plain).reference == "a"
    for more in ({"system": "s"}, {"history": [["x", "y"]]}, {"tools": TOOLS}):
        with pytest.raises(DataError, match=f"column {next(iter(more))} has no place"):
            read(tmp_path, {**row, **more}, plain)
    with pytest.raises(DataError, match="no chat template"):
        read(tmp_path, {"messages": [USER, ANSWER]}, plain)


def test_keys_that_a_template_does_not_show_are_said(capfd):
    turns = [USER, {**ANSWER, "inner_thoughts": "hm"}]
    read_by = byte_tokenizer()
    encode({"messages": turns}, read_by, OPTIONS)
    assert "does not show 'inner_thoughts'" in " ".join(capfd.readouterr().err.split())
    content = "{{ message['content'] }}"
    read_by.chat_template = CHAT_TEMPLATE.replace(
        content, "{{ message['inner_thoughts'] }}" + content
    )
    assert "hma" in text({"messages": turns}, read_by)


def test_variables_of_the_template_are_those_of_the_row():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ '[think]' if enable_thinking }}" + CHAT_TEMPLATE
    row = {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": True}}
    assert text(row, tokenizer).startswith("[think]")
    assert not text({"messages": [USER, ANSWER]}, tokenizer).startswith("[think]")


def calling(*names, **more):
    calls = [{"type": "function", "function": {**CALL, "name": name}} for name in names]
    return {"role": "assistant", "tool_calls": calls, **more}


def said(content):
    return {"role": "assistant", "content": content}


THOUGHT = said("<think>long reasoning</think>4")
PARTED = {**THOUGHT, "content": [{"type": "text", "text": THOUGHT["content"]}]}


@pytest.mark.parametrize(
    ("template", "turns", "every", "message"),
    [
        (LAST_THOUGHT, [USER, THOUGHT], False, r"out 'long reasoning' of turn 2 \(assistant\), which is"),
        (LAST_THOUGHT, [USER, PARTED], True, "out 'long reasoning' of turn 2"),
        (LAST_THOUGHT, [USER, said("<think>4</think>4")], False, "out '4' of turn 2"),
        (LAST_THOUGHT, [USER, said("<think>The capital is Paris.</think>The capital is Paris.")], False,
         "out 'The capital is Paris.' of turn 2"),
        (CALL_ALONE, [USER, calling("f", content="I look")], False, "out 'I look' of turn 2"),
        (CALL_ALONE, [USER, calling("f", content="I look"), USER, ANSWER], True, "out 'I look' of turn 2"),
        (FIRST_CALL, [USER, calling("f", "g")], False, r"out call 2 \(g\) of turn 2"),
        (FIRST_CALL, [USER, calling("f", "f")], False, r"out call 2 \(f\) of turn 2"),
        (USERS_AND_LAST, [USER, said("q"), USER, ANSWER], False, r"leaves out turn 2 \(assistant\)"),
        (USERS_AND_LAST, [USER, said("Something else."), USER, said("b")], True, "leaves out turn 2"),
        (MOVED_THOUGHT, [USER, said("first <think>b</think>a")], False, "out 'first' of turn 2"),
    ],
)  # fmt: skip
def test_answers_that_a_template_leaves_out_are_refused(tmp_path, template, turns, every, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    options = with_plugin_options(TrainConfig)(
        output_dir="o", dataset=str(tmp_path / "d.jsonl"), assistant_only_loss=every
    )
    with pytest.raises(DataError, match=rf"d.jsonl, line 1.*{message}"):
        load_samples(options, tokenizer, 0)


@pytest.mark.parametrize(
    ("template", "turns", "every"),
    [
        (LAST_THOUGHT, [USER, THOUGHT, USER, ANSWER], True),  # a thought of history
        (LAST_THOUGHT, [USER, said("Something else.")], False),
        (CALL_ALONE, [USER, calling("f", content="I look"), USER, ANSWER], False),  # which is not learnt
        (CALL_ALONE, [USER, calling("f", "g", content="")], True),
        (CALL_ALONE, [USER, calling("f", "f"), USER, ANSWER], True),
        (FIRST_CALL, [USER, calling("f", content="I look")], True),
        (MOVED_THOUGHT, [USER, THOUGHT, USER, THOUGHT], False),
        (MOVED_THOUGHT, [USER, said("<think>4</think>\n\n 4 \n")], True),
        (MOVED_THOUGHT, [USER, said("")], False),
        (MOVED_THOUGHT.replace("c[-1]", "c[-1].upper()"), [USER, THOUGHT], False),
        (TURNS + "{{ m.content | trim }}" + END, [USER, said(" a\n"), USER, said("\n b")], True),
    ],
)  # fmt: skip
def test_what_templates_do_to_answers_is_theirs(template, turns, every):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    options = with_plugin_options(TrainConfig)(output_dir="o", assistant_only_loss=every)
    found = encode({"messages": turns}, tokenizer, options).input_ids
    assert found == tokenizer.apply_chat_template(turns, return_dict=False)


@pytest.mark.parametrize("arguments", [{"city": "Zürich"}, '{"city": "Zürich"}'])
def test_templates_that_join_arguments_to_text_get_json(arguments):
    """As DeepSeek V3's does: `'<call>' + call['function']['arguments']` fails for objects."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}"
        "{{ '<call>' + c['function']['name'] + ' ' + c['function']['arguments'] + '</call>' }}"
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]
    ids = encode(
        {"messages": turns}, tokenizer, with_plugin_options(TrainConfig)(output_dir="o")
    ).input_ids
    assert '<call>weather {"city": "Zürich"}</call>' in tokenizer.decode(ids)


def test_names_that_only_calls_show_are_said(capfd):
    """A template that writes `function.name` mentions the key, and shows no speaker's name all the same."""
    chat._say_once.cache_clear()
    users = [{**USER, "name": name, "content": name[0]} for name in ("Bob", "Eve")]
    row = {"messages": [*users, ANSWER]}
    mentions = byte_tokenizer()
    mentions.chat_template = "{# function.name #}" + CHAT_TEMPLATE
    assert "Bob" not in text(row, mentions)
    assert "does not show 'name' of turns" in " ".join(capfd.readouterr().err.split())
    chat._say_once.cache_clear()
    shows = byte_tokenizer()
    content = "{{ message['content'] }}"
    shows.chat_template = CHAT_TEMPLATE.replace(content, "{{ message['name'] }}" + content)
    assert "Bob" in text(row, shows)
    assert "does not show" not in capfd.readouterr().err


@pytest.mark.parametrize("key", ["loss", "training", "train"])
def test_answers_left_out_of_the_loss_are_refused(tmp_path, key):
    turns = [USER, {**ANSWER, key: False}, USER, ANSWER]
    with pytest.raises(DataError, match=f"has {key}=False, but no assistant turn can be weighted"):
        read(tmp_path, {"messages": turns})
    turns[1][key] = True
    assert read(tmp_path, {"messages": turns})
