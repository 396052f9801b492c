"""Answers against a hand-written loop over logits, whatever `generation_config` says."""

import json
import shutil

import pytest
import torch
from llm_reference import load
from peft import PeftModel
from transformers import AutoTokenizer

import emloc
from emloc.errors import ConfigError, DataError
from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
from emloc.integrations.transformers.generation import (
    closing_tokens,
    greedy_answers,
    own_ends,
    say_missing_ends,
)
from emloc.integrations.transformers.loading import load_tokenizer
from emloc_llm.example import write_model

SETTINGS = [
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 12},
    {"min_length": 200},
    {"max_length": 5},
    {"repetition_penalty": 5.0},
    {"num_beams": 3, "length_penalty": 4.0},
    {"do_sample": True, "temperature": 9.0, "top_k": 3, "num_return_sequences": 2},
    {"forced_bos_token_id": 40},
    {"forced_eos_token_id": 41},
    {"suppress_tokens": list(range(3, 120))},
    {"begin_suppress_tokens": list(range(3, 259))},
    {"bad_words_ids": [[token] for token in range(3, 120)]},
    {"sequence_bias": [[[60], 90.0]]},
    {"exponential_decay_length_penalty": [1, 50.0]},
    {"guidance_scale": 8.0},
    {"renormalize_logits": True, "remove_invalid_values": True},
    {"stop_strings": ["a"]},
    {"max_time": 1e-9},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 3},
    {"return_dict_in_generate": True, "output_scores": True},
    {"encoder_repetition_penalty": 3.0},
    {"watermarking_config": {"bias": 50.0, "greenlist_ratio": 0.5}},
]


def by_hand(model, prompt, ends, steps):
    """The likeliest token, again and again."""
    ids = list(prompt)
    for _ in range(steps):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def prompts():
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, 250, (length,), generator=draw).tolist() for length in (9, 4, 6)]


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_greedy_is_the_likeliest_token(tiny, tmp_path, prompts, settings):
    base = shutil.copytree(tiny.base, tmp_path / "base")
    plain = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**plain, **settings}))
    model, tokenizer = load(base), byte_tokenizer()
    before = model.generation_config.to_dict()
    found = greedy_answers(model, tokenizer, left_padded(prompts), 8)
    expected = [
        tokenizer.decode(by_hand(load(tiny.base), prompt, {2}, 8), skip_special_tokens=True)
        for prompt in prompts
    ]
    assert found == expected
    assert model.generation_config.to_dict() == before


@torch.no_grad()
def test_within_peft_too(tiny, prompts):
    model = load(tiny.base)
    model.generation_config.no_repeat_ngram_size = 1
    adapted = PeftModel.from_pretrained(model, str(tiny.corrected)).eval()
    found = greedy_answers(adapted, byte_tokenizer(), left_padded(prompts), 6)
    expected = [by_hand(adapted, prompt, {2}, 6) for prompt in prompts]
    assert found == [byte_tokenizer().decode(ids, skip_special_tokens=True) for ids in expected]
    assert adapted.generation_config.no_repeat_ngram_size == 1


@torch.no_grad()
def test_an_answer_ends_before_its_first_end(tiny, prompts):
    """Also at an end that is an ordinary token, which decoding would leave in."""
    model, tokenizer = load(tiny.base), byte_tokenizer()
    [whole] = [by_hand(model, prompts[0], {2}, 8)]
    end = whole[3]
    [found, *_] = greedy_answers(model, tokenizer, left_padded(prompts), 8, {end})
    assert found == tokenizer.decode(whole[: whole.index(end)], skip_special_tokens=True)


def test_what_cannot_generate_is_one_sentence(tiny, monkeypatch):
    model = load(tiny.base)
    monkeypatch.setattr(model, "can_generate", lambda: False)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        greedy_answers(model, byte_tokenizer(), {"input_ids": torch.tensor([[5]])}, 2)


@pytest.fixture(scope="module")
def wordy():
    """A tokenizer with special tokens that open, divide and close answers, and some by no name."""
    tokenizer = byte_tokenizer()
    more = ["[TOOL_CALLS]", "<|channel|>", "<|end|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": more})
    return tokenizer


@pytest.mark.parametrize(
    ("answers", "ends"),
    [
        (["abc<|im_end|>\n"], {"<|im_end|>"}),
        (["abc<|end|>\n<|im_end|>"], {"<|end|>", "<|im_end|>"}),
        (["[TOOL_CALLS][{}]<|im_end|>", "abc<|im_end|>"], {"<|im_end|>"}),
        (["<|channel|>final abc<|end|>", "<|channel|>call x<|eot_id|>"], {"<|end|>", "<|eot_id|>"}),
        (["a<|end|>b<|im_end|>", "a<|end|><|im_end|>"], {"<|im_end|>"}),
        (["abc"], set()),
        (["abc\n"], set()),
        ([], set()),
    ],
)
def test_closing_tokens_are_those_behind_answers(wordy, answers, ends):
    ids = [wordy(text, add_special_tokens=False)["input_ids"] for text in answers]
    assert {wordy.convert_ids_to_tokens(token) for token in closing_tokens(ids, wordy)} == ends


def ending_elsewhere(folder):
    """A base model whose own files know another end than its template, as many base models' do."""
    base = write_model(folder)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    tokenizer.save_pretrained(base)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**content, "eos_token_id": 0}))
    return base


def test_generation_ends_where_the_chat_template_closes_the_answer(tmp_path, capfd):
    base = ending_elsewhere(tmp_path / "base")
    data = tmp_path / "d.jsonl"
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "abc"}]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 4)
    adapter = emloc.train(
        model_name_or_path=str(base), dataset=str(data), output_dir=tmp_path / "adapter",
        max_steps=90, learning_rate=1e-2,
    )  # fmt: skip
    found = emloc.evaluate(
        model_name_or_path=str(base), adapter=str(adapter), dataset=str(data), max_new_tokens=24
    )
    assert [answer["prediction"] for answer in found["answers"]] == ["abc"] * 4
    assert found["exact_match"] == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "answers end with <|im_end|> (2)" in said
    assert "add it to eos_token_id" in said
    merged = emloc.merge(adapter=str(adapter), output_dir=tmp_path / "merged")
    of = "generation_config.json"
    assert json.loads((merged / of).read_text()) == json.loads((base / of).read_text())


def test_own_ends_are_those_of_the_models_files(tmp_path, tiny, capfd):
    model, tokenizer = load(tiny.base), load_tokenizer(tiny.base)
    assert own_ends(model, tokenizer) == {2}
    say_missing_ends(model, tokenizer, {2})
    say_missing_ends(model, tokenizer, set())
    assert "note:" not in capfd.readouterr().err
    model.generation_config.eos_token_id = [7, 8]
    assert own_ends(model, tokenizer) == {2, 7, 8}
    base = ending_elsewhere(tmp_path / "base")
    assert own_ends(load(base), AutoTokenizer.from_pretrained(base)) == {0}


def test_half_a_question_is_not_answered(tiny):
    options = {"model_name_or_path": str(tiny.base), "dataset": str(tiny.test), "max_length": 34}
    with pytest.raises(DataError, match=r"\d of 8 prompts .* longer than max_length=34"):
        emloc.evaluate(**options)
    assert emloc.evaluate(max_new_tokens=0, **options)["loss"] > 0
