"""Loss on answers, and scores of greedy answers to questions about images."""

from collections.abc import Sequence
from typing import Any

import torch

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.locate import locate
from emloc.errors import ConfigError, DataError
from emloc.extend.capabilities import native_of
from emloc.extend.family import ModelFamily
from emloc.extend.losses import LossSum, loss_sum, summed
from emloc.integrations.peft.attach import attach
from emloc.integrations.transformers.answers import AnswerWords, words_of
from emloc.integrations.transformers.capacity import capacity_of
from emloc.integrations.transformers.generation import greedy_answers, say_missing_ends
from emloc.integrations.transformers.tables import dataset_names, say_unweighted
from emloc.machine.memory import PeakMemory
from emloc.machine.progress import progress_bar
from emloc_vlm.encode import answer_words, collate, end_tokens, references_of
from emloc_vlm.examples import Example
from emloc_vlm.processor import load_processor
from emloc_vlm.rows import load_examples, readable
from emloc_vlm.scoring import METRICS


def evaluate_model(config: Any, family: ModelFamily) -> dict[str, Any]:
    """Scores of a model with or without an adapter.

    Returns:
        `loss` (per answer token), the metric's scores (`exact_match` always among them), `samples`,
        `answers` with question, references and prediction of each, and `peak_bytes`.
    """
    with PeakMemory(config.device, mapped=True) as peak:
        scores = _evaluate(config, family)
    return {**scores, **peak.figures()}


def _evaluate(config: Any, family: ModelFamily) -> dict[str, Any]:
    say_unweighted(config)
    path = locate(config.model_name_or_path)
    processor = load_processor(path, config.max_dynamic_patch)
    examples = [one for name in dataset_names(config) for one in load_examples(config, name)]
    examples = readable(examples[: config.num_samples], config)
    if not examples:
        raise DataError(f"Data set {config.dataset}: no sample has an image that can be read.")
    chosen = _metric(examples, config)
    checkpoint = native_of(family, Checkpoint.open(path))
    model: Any = family.load(checkpoint, config.dtype, config.device)
    if config.adapter:
        model = attach(model, config.adapter, checkpoint, family)
    with torch.inference_mode():
        loss = _loss(family, model, examples, processor, config)
        answers = _answers(model, examples, processor, config)
    metric = METRICS[chosen]
    for answer, example in zip(answers, examples):
        reader = answer_words(example, processor, config)
        answer["scores"] = metric.score(_as_words(answer, reader))
    aggregated = metric.aggregate([answer["scores"] for answer in answers]) if answers else {}
    return {
        "loss": loss,
        "exact_match": None,
        **aggregated,
        "metric": chosen,
        "samples": len(examples),
        "answers": answers,
    }


def _metric(examples: list[Example], config: Any) -> str:
    if config.metric != "auto":
        return config.metric
    metrics = {example.metric or "exact_match" for example in examples}
    if len(metrics) > 1:
        raise ConfigError(
            f"The data sets {config.dataset} are scored by {' and '.join(sorted(metrics))}; evaluate them "
            f"one by one, or set metric."
        )
    return metrics.pop()


def _loss(
    family: ModelFamily,
    model: Any,
    examples: list[Example],
    processor: Any,
    config: Any,
) -> float:
    parts: list[LossSum] = []
    size, capacity = config.per_device_eval_batch_size, capacity_of(model)
    with progress_bar("loss", len(examples)) as advance:
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            batch = collate(part, processor, config, capacity=capacity)
            parts.append(loss_sum(family, model, _to(model, batch, config.device)))
            advance(len(part))
    return summed(parts).mean(f"Data set {config.dataset}")


def _answers(
    model: Any, examples: list[Example], processor: Any, config: Any
) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    if config.max_new_tokens == 0:
        return answers
    examples = examples[: config.num_answers]
    size = config.per_device_eval_batch_size
    tokenizer = processor.tokenizer
    closing = end_tokens(examples, processor, config)
    say_missing_ends(model, tokenizer, closing)
    with progress_bar("answers", len(examples)) as advance:
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            batch = _to(model, collate(part, processor, config, answers=False), config.device)
            batch.pop("labels")
            texts = greedy_answers(model, tokenizer, batch, config.max_new_tokens, closing)
            for example, prediction in zip(part, texts):
                references = references_of(example, processor, config)
                answers.append(_answered(example, references, prediction.strip()))
            advance(len(part))
    return answers


def _answered(example: Example, references: Sequence[str], prediction: str) -> dict[str, Any]:
    question = [
        part["text"]
        for turn in example.messages
        if turn["role"] == "user"
        for part in turn["content"]
        if part["type"] == "text"
    ]
    return {
        "where": example.where,
        "question": question[-1] if question else "",
        "reference": references[0] if len(references) == 1 else list(references),
        "prediction": prediction,
        "options": dict(example.options),
        "kind": example.kind,
    }


def _as_words(answer: dict[str, Any], reader: AnswerWords) -> dict[str, Any]:
    """The answer as it is compared: words alone."""
    given = answer["reference"]
    reference = words_of(given) if isinstance(given, str) else list(map(words_of, given))
    words = reader.in_prediction(answer["prediction"])
    return {**answer, "reference": reference, "prediction": words}


def _to(model: Any, batch: dict[str, Any], device: str) -> dict[str, Any]:
    """Move a batch to the device; images in the model's dtype."""
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    return {
        name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in moved.items()
    }
