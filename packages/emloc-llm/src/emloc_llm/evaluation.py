"""Loss on completions, and exact match of greedy answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from emloc.adapters.rounding import Rounding
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.intact import require_read
from emloc.artefacts.locate import locate
from emloc.errors import ConfigError, DataError, DependencyError
from emloc.extend.family import ModelFamily
from emloc.extend.losses import LossSum, loss_sum, summed
from emloc.integrations.peft.attach import attach
from emloc.integrations.transformers.answers import AnswerWords, words_of
from emloc.integrations.transformers.capacity import load_capacity
from emloc.integrations.transformers.generation import (
    closing_tokens,
    greedy_answers,
    say_missing_ends,
)
from emloc.integrations.transformers.loading import load_tokenizer
from emloc.integrations.transformers.sampling import in_batches
from emloc.integrations.transformers.tables import dataset_names, say_unweighted
from emloc.machine.memory import PeakMemory
from emloc.machine.progress import progress_bar
from emloc_llm.data import Sample, encode_all, pad, say_truncated
from emloc_llm.matching import matches
from emloc_llm.rows import load_rows


def evaluate_model(config: Any, family: ModelFamily) -> dict[str, Any]:
    """Scores of a model with or without an adapter.

    Returns:
        `loss` (per completion token), `exact_match` (share, or None without references), `samples`,
        `answers` with prompt, reference and prediction of each, and `peak_bytes`; where tasks
        are given, lm-eval's scores as `tasks`, which without a data set are all there is.

    Raises:
        ConfigError, DataError, DependencyError: see their messages.
    """
    say_unweighted(config)
    tasks = _lm_eval(config) if config.tasks else {}
    return tasks if tasks and config.dataset is None else {**_scores(config, family), **tasks}


def _scores(config: Any, family: ModelFamily) -> dict[str, Any]:
    with PeakMemory(config.device, mapped=True) as peak:
        scores = _evaluate(config, family)
    return {**scores, **peak.figures()}


def _evaluate(config: Any, family: ModelFamily) -> dict[str, Any]:
    path = locate(config.model_name_or_path)
    tokenizer = load_tokenizer(path)
    samples: list[Sample] = []
    for name in dataset_names(config) or [""]:
        rows = load_rows(config, name)
        if config.num_samples:
            rows = rows.take(config.num_samples - len(samples))
        samples += encode_all(rows, tokenizer, config, name)
        if len(samples) == config.num_samples:
            break
    say_truncated(samples, config, f"samples of {config.dataset}")
    asked = [sample for sample in samples if sample.reference is not None][: config.num_answers]
    if config.max_new_tokens == 0:
        asked = []
    _require_questions(asked, config)
    capacity = load_capacity(path, AutoModelForCausalLM)
    capacity.check((sample.input_ids for sample in samples), tokenizer, "The samples")
    capacity.check(
        (sample.prompt for sample in asked), tokenizer, "The prompts", more=config.max_new_tokens
    )
    checkpoint = Checkpoint.open(path)
    model: Any = family.load(checkpoint, config.dtype, config.device)
    if config.adapter:
        model = attach(model, config.adapter, checkpoint, family)
    with torch.inference_mode():
        loss = _loss(family, model, samples, tokenizer, config)
        answers = _answers(model, asked, tokenizer, config)
    right = [entry["match"] for entry in answers]
    return {
        "loss": loss,
        "exact_match": sum(right) / len(right) if right else None,
        "samples": len(samples),
        "answers": answers,
    }


def _loss(
    family: ModelFamily,
    model: Any,
    samples: list[Sample],
    tokenizer: Any,
    config: Any,
) -> float:
    parts: list[LossSum] = []
    with progress_bar("loss", len(samples)) as advance:
        by_length = sorted(samples, key=lambda sample: -len(sample.input_ids))  # pads little
        for part in in_batches(by_length, config.per_device_eval_batch_size):
            batch = {k: v.to(config.device) for k, v in pad(part, tokenizer.pad_token_id).items()}
            parts.append(loss_sum(family, model, batch))
            advance(len(part))
    return summed(parts).mean(f"Data set {config.dataset}")


def _answers(model: Any, asked: list[Sample], tokenizer: Any, config: Any) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    whole = (s.input_ids[s.prompt_length :] for s in asked if not s.truncated)
    closing = closing_tokens(whole, tokenizer)
    say_missing_ends(model, tokenizer, closing)
    with progress_bar("answers", len(asked)) as advance:
        for part in in_batches(asked, config.per_device_eval_batch_size):
            prompts = [Sample(s.prompt, [], len(s.prompt), None, False) for s in part]
            batch = pad(prompts, tokenizer.pad_token_id, left=True)
            inputs = {
                name: batch[name].to(config.device) for name in ("input_ids", "attention_mask")
            }
            texts = greedy_answers(model, tokenizer, inputs, config.max_new_tokens, closing)
            for sample, prediction in zip(part, texts):
                answers.append(_scored(sample, prediction.strip(), tokenizer, config.answer))
            advance(len(part))
    return answers


def _require_questions(asked: Sequence[Sample], config: Any) -> None:
    """An answer to nothing, or to half a question, would be scored like any other."""
    if any(not sample.prompt for sample in asked):
        raise DataError("A sample has an empty prompt, so there is nothing to answer.")
    cut = sum(len(sample.prompt) > config.max_length for sample in asked)
    if cut:
        raise DataError(
            f"{cut} of {len(asked)} prompts of {config.dataset} are longer than max_length="
            f"{config.max_length}, so their ends would not be read; raise max_length, or pass "
            f"max_new_tokens=0 for the loss alone."
        )


def _scored(sample: Sample, prediction: str, tokenizer: Any, answer: str) -> dict[str, Any]:
    reference = str(sample.reference).strip()
    prompt = tokenizer.decode(sample.prompt, skip_special_tokens=True)
    reader = AnswerWords.of(sample.written, reference, tokenizer, f"The prompt {prompt!r:.60}")
    words = reader.in_prediction(prediction)
    return {
        "prompt": prompt,
        "reference": reference,
        "prediction": prediction,
        "match": matches(reference, prediction, answer)
        or matches(words_of(reference), words, answer),
    }


def _lm_eval(config: Any) -> dict[str, Any]:
    # As a mapping, for paths may hold the marks of its text form.
    arguments = {"pretrained": str(config.model_name_or_path), "dtype": config.dtype}
    if config.adapter:
        if Rounding.runs_on(require_read(Path(config.adapter), fresh=True)) is not None:
            raise ConfigError(
                f"evaluate: tasks put an adapter on the base's own weights, and {config.adapter} runs on "
                f"dequantised ones; merge it, and pass the merged model without an adapter."
            )
        arguments["peft"] = str(config.adapter)
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    except ImportError as problem:
        raise DependencyError("tasks need lm-eval; pip install 'emloc-llm[lm-eval]'.") from problem
    results = simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=config.tasks,
        limit=config.num_samples,
        batch_size=config.per_device_eval_batch_size,
        device=config.device,
    )
    return {"tasks": results["results"]}
