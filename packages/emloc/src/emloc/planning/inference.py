"""The memory of running a model: weights, the cache of keys and values, and a forward over the prompt."""

from typing import Any

from emloc.planning.layers import planned_layers
from emloc.planning.ledger import Lines, lines_of
from emloc.planning.step import Precision, StepOptions
from emloc.planning.subject import Subject
from emloc.planning.training import without_lora


def inference_lines(subject: Subject, options: Any) -> Lines:
    """The device's lines for one sample of the largest size, without the allocator's slack."""
    weights = subject.weight_bytes(options.dtype)
    family = subject.planned
    if family is None:
        return lines_of(weights=weights)
    batch = family.planned_batch(subject.checkpoint, options, 1)
    layers = without_lora(planned_layers(subject.model, subject.shapes, [], (), options))
    itemsize = subject.itemsize(options.dtype)
    run = StepOptions(Precision(itemsize), on_gpu=options.device.startswith("cuda"))
    sizes = family.step_sizes(subject.model, layers, batch, run)
    others = family.other_models(subject.checkpoint, options)
    return lines_of(
        weights=weights,
        other_models=itemsize * sum(model.parameters for model in others.values()),
        cache=itemsize * family.cache_elements(subject.model, options),
        working_tensors=sizes.phases["forward"].total if sizes else 0,
    )
