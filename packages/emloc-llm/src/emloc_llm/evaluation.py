"""Loss on completions, and exact match of greedy answers."""

import json
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from emloc.checkpoint import Checkpoint, locate
from emloc.config import EvaluateConfig
from emloc.errors import DataError, DependencyError
from emloc.family import ModelFamily
from emloc.integrations.peft.attach import attach
from emloc.integrations.transformers.loading import load_model, load_tokenizer
from emloc.integrations.transformers.loss import next_token_loss
from emloc.memory import PeakMemory
from emloc.progress import progress_bar
from emloc_llm.data import Sample, encode_all, in_batches, pad, say_truncated
from emloc_llm.rows import load_rows

FINAL_NUMBER = re.compile(r"####\s*([-+]?[\d,]*\.?\d+)")
MARKED_OPTION = re.compile(r"####\s*\(?([a-h])\b", re.IGNORECASE)
FINAL_OPTION = re.compile(MARKED_OPTION.pattern + r"[).]*\s*$", re.IGNORECASE)
ANY_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def evaluate_model(config: EvaluateConfig, family: ModelFamily) -> dict[str, Any]:
    """Scores of a model with or without an adapter.

    Returns:
        `loss` (per completion token), `exact_match` (share, or None without references), `samples`,
        `answers` with prompt, reference and prediction of each, and `peak_bytes`.
    """
    if config.tasks:
        return _lm_eval(config)
    with PeakMemory(config.device, mapped=True) as peak:
        scores = _evaluate(config, family)
    return {**scores, **peak.figures()}


def _evaluate(config: EvaluateConfig, family: ModelFamily) -> dict[str, Any]:
    path = locate(config.model_name_or_path)
    tokenizer = load_tokenizer(path)
    rows = load_rows(config)
    if config.num_samples:
        rows = rows.take(config.num_samples)
    samples = encode_all(rows, tokenizer, config, str(config.dataset))
    say_truncated(samples, config, f"samples of {config.dataset}")
    model = load_model(path, AutoModelForCausalLM, config.dtype, config.device).eval()
    if config.adapter:
        model = attach(model, config.adapter, Checkpoint.open(str(path)), family)
    with torch.inference_mode():
        loss = _loss(model, samples, tokenizer, config)
        answers = _answers(model, samples, tokenizer, config)
    matches = [entry["match"] for entry in answers]
    return {
        "loss": loss,
        "exact_match": sum(matches) / len(matches) if matches else None,
        "samples": len(samples),
        "answers": answers,
    }


def _loss(model: Any, samples: list[Sample], tokenizer: Any, config: EvaluateConfig) -> float:
    total, count = 0.0, 0
    with progress_bar("loss", len(samples)) as advance:
        by_length = sorted(samples, key=lambda sample: -len(sample.input_ids))  # pads little
        for part in in_batches(by_length, config.per_device_eval_batch_size):
            batch = {k: v.to(config.device) for k, v in pad(part, tokenizer.pad_token_id).items()}
            result = next_token_loss(model, batch)
            total, count = total + result.total, count + result.terms
            advance(len(part))
    return total / max(1, count)


def _answers(
    model: Any, samples: list[Sample], tokenizer: Any, config: EvaluateConfig
) -> list[dict[str, Any]]:
    asked = [sample for sample in samples if sample.reference is not None][: config.num_answers]
    answers: list[dict[str, Any]] = []
    if config.max_new_tokens == 0:
        return answers
    with progress_bar("answers", len(asked)) as advance:
        for part in in_batches(asked, config.per_device_eval_batch_size):
            prompts = [
                Sample(s.input_ids[: s.prompt_length], [], s.prompt_length, None, False)
                for s in part
            ]
            if any(not prompt.input_ids for prompt in prompts):
                raise DataError("A sample has an empty prompt, so there is nothing to answer.")
            batch = pad(prompts, tokenizer.pad_token_id, left=True)
            generated = model.generate(
                input_ids=batch["input_ids"].to(config.device),
                attention_mask=batch["attention_mask"].to(config.device),
                max_new_tokens=config.max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(
                generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for sample, prediction in zip(part, texts):
                answers.append(_scored(sample, prediction.strip(), tokenizer, config.answer))
            advance(len(part))
    return answers


def _scored(sample: Sample, prediction: str, tokenizer: Any, answer: str) -> dict[str, Any]:
    reference = str(sample.reference).strip()
    return {
        "prompt": tokenizer.decode(
            sample.input_ids[: sample.prompt_length], skip_special_tokens=True
        ),
        "reference": reference,
        "prediction": prediction,
        "match": matches(reference, prediction, answer),
    }


def matches(reference: str, prediction: str, answer: str = "auto") -> bool:
    """Whether a prediction is the reference: as text, as JSON, by its final number or option.

    `auto` compares numbers where the reference ends in GSM8K's `#### number`, letters where it ends in
    `#### letter`, JSON where it parses as an object or list, and text otherwise. The final number of a
    prediction without `####` is its last number; a letter has to be marked.
    """
    kind = _kind(reference) if answer == "auto" else answer
    if kind == "number":
        wanted, found = _final_number(reference), _final_number(prediction)
        return wanted is not None and wanted == found
    if kind == "option":
        letters, given = FINAL_OPTION.findall(reference), MARKED_OPTION.findall(prediction)
        return bool(letters and given) and letters[-1].lower() == given[-1].lower()
    if kind == "json":
        try:
            return bool(json.loads(reference) == json.loads(prediction))
        except ValueError:
            return False
    return reference.strip() == prediction.strip()


def _kind(reference: str) -> str:
    if FINAL_NUMBER.search(reference):
        return "number"
    if FINAL_OPTION.search(reference):
        return "option"
    try:
        parsed = json.loads(reference)
    except ValueError:
        return "text"
    return "json" if isinstance(parsed, dict | list) else "text"


def _final_number(text: str) -> float | None:
    marked = FINAL_NUMBER.findall(text)
    found = marked or ANY_NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _lm_eval(config: EvaluateConfig) -> dict[str, Any]:
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    except ImportError as problem:
        raise DependencyError("tasks need lm-eval; pip install 'emloc-llm[lm-eval]'.") from problem
    arguments = f"pretrained={config.model_name_or_path},dtype={config.dtype}"
    if config.adapter:
        arguments += f",peft={config.adapter}"
    found = simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=config.tasks,
        limit=config.num_samples,
        batch_size=config.per_device_eval_batch_size,
        device=config.device,
    )
    return {"tasks": found["results"]}
