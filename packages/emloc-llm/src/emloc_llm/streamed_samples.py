"""Samples of training that are read while it goes on, never all at once."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from emloc.integrations.transformers.capacity import Capacity
from emloc.integrations.transformers.data.rows import where_of
from emloc.integrations.transformers.tables import dataset_names, shares
from emloc.machine.progress import console
from emloc_llm.data import encode, learnable, require_labels, seen
from emloc_llm.rows import load_rows


class StreamedSamples:
    """Rows of all data sets, encoded as they come and interleaved by weight.

    Args:
        config: of training.
        tokenizer: of the model.
        capacity: the model's, to which every sample is held.
    """

    def __init__(self, config: Any, tokenizer: Any, capacity: Capacity) -> None:
        self._config, self._tokenizer, self._capacity = config, tokenizer, capacity
        self._counts: Counter[str] = Counter()

    def data(self) -> Any:
        """An `IterableDataset` of `input_ids` and `labels`.

        Raises:
            DataError: while it is read, of a malformed row, or at the end of a data set that teaches nothing.
        """
        from datasets import (
            DatasetInfo,
            Features,
            IterableDataset,
            Sequence,
            Value,
            interleave_datasets,
        )
        from datasets.iterable_dataset import ExamplesIterable

        config = self._config
        tokens = Sequence(Value("int64"))
        features = Features({"input_ids": tokens, "labels": tokens})
        # from_generator would hash what the generator holds, for a cache that a stream has not.
        parts = [
            IterableDataset(
                ExamplesIterable(self._encoded, {"name": name}),
                info=DatasetInfo(features=features),
            )
            for name in dataset_names(config)
        ]
        weights = shares(config, [1] * len(parts))
        mixed = (
            parts[0]
            if len(parts) == 1
            else interleave_datasets(
                parts, probabilities=weights, seed=config.seed, stopping_strategy="all_exhausted"
            )
        )
        return mixed.shuffle(seed=config.seed, buffer_size=1000)

    def figures(self) -> dict[str, int]:
        """Counts of the samples that were read, which is ahead of training and each time that they came, and
        of those among them that were cut."""
        return {
            "read_samples": self._counts["samples"],
            "truncated_samples": self._counts["truncated"],
        }

    def _encoded(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        config, taught = self._config, 0
        for row in load_rows(config, name):
            sample = encode(row, self._tokenizer, config)
            self._capacity.check(seen(sample, config), self._tokenizer, where_of(row))
            if not learnable([sample]):
                self._say("without labels", f"{row.where} has no label to learn from")
                continue
            if sample.truncated:
                self._say("truncated", f"{row.where} is longer than max_length={config.max_length}")
            taught += 1
            self._counts["samples"] += 1
            yield row.where, {"input_ids": sample.input_ids, "labels": sample.labels}
        if not taught:
            require_labels([], config, name)

    def _say(self, what: str, first: str) -> None:
        """Tell of the first sample of a kind; the last count is in the manifest."""
        self._counts[what] += 1
        if self._counts[what] == 1:
            done = "cut there" if what == "truncated" else "left out"
            console.print(
                f"streaming: {first} and is {done}, as all such samples are", markup=False
            )
