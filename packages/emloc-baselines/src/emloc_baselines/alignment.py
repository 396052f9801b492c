"""LoRAM's alignment: continued pre-training of the whole pruned model, on general text, by its publisher.

The authors' script trains every weight but the output head's, in batches of 128 sequences of 512 tokens of
FineWeb and OpenWebMath, at 5e-5 under a cosine; so the defaults here but for the batch.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from emloc.artefacts.checkpoint import Checkpoint
from emloc.training.continued import ContinuedOptions, continued, train_further
from emloc_baselines.light import Source


def alignment(
    source: Source, options: ContinuedOptions
) -> Callable[[Path], Mapping[str, Any]] | None:
    """A function that aligns a pruned model in its folder; None for no steps."""

    def train(work: Path) -> dict[str, Any]:
        model = cast(
            Any, source.family.load(Checkpoint.open(work), "float32", source.config.device)
        )
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        own = None if head is None or head.weight is table.weight else head.weight
        trained = {
            name: parameter for name, parameter in model.named_parameters() if parameter is not own
        }
        return train_further(
            source,
            work,
            model,
            trained,
            lambda batch: source.family.loss(model, batch),
            options,
            "alignment",
        )

    return continued(train, options)
