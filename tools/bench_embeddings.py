"""Embeddings and head in few bits, all else as it is: bytes, error, KL to the base.

    python tools/bench_embeddings.py --model_name_or_path MODEL --test test.jsonl
        [--column_map question=prompt,answer=completion] [--test_samples 40]

`error` is the relative error of the table, `kl` the divergence from the base's predictions per answer token,
as in `sweep_formats.py`; `bytes` are of the tables, `model_bytes` of all weights, the others in 16 bits.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.compression.vocabulary import choose_tables
from emloc.config import CompressConfig
from emloc.extend.opening import open_model
from emloc.extend.plugin_options import of_family, with_plugin_options
from emloc.formats.vocabulary import VocabularyTable
from emloc.integrations.transformers.loss import labelled_logits
from emloc.integrations.transformers.vocabulary import replace_tables
from emloc.linalg.row_rounding import rounded_parts
from emloc.options.build import build


@torch.no_grad()
def predictions(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probabilities at the answers' places."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = labelled_logits(model, batch["labels"], lambda: model(**inputs, use_cache=False))
    return torch.log_softmax(logits.float(), -1)


def put(model: Any, tables: tuple[VocabularyTable, ...]) -> float:
    """Let a model have its tables in few bits; the relative error of the first."""
    errors: list[float] = []
    names = [table.layers[0] for table in tables]
    dense = {name: model.get_submodule(name).weight.detach() for name in names}
    replace_tables(model, tables)
    for table in tables:
        module, values = model.get_submodule(table.layers[0]), dense[table.layers[0]]
        parts = [
            table.matrix.encoded(grid, codes)
            for grid, codes in rounded_parts(values, table.bits, table.group_size)
        ]
        stored = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        module.load_state_dict(stored, strict=False)
        errors.append(float((module.weight - values).norm() / values.norm()))
    return errors[0]


def main() -> None:
    """Measure and print, a line of JSON for each number of bits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--column_map")
    parser.add_argument("--test_samples", type=int, default=40)
    options = parser.parse_args()
    columns = {"column_map": options.column_map} if options.column_map else {}
    config = build(with_plugin_options(CompressConfig), dict(
        model_name_or_path=str(options.model_name_or_path), output_dir="unused",
        dataset=str(options.test), num_calibration_samples=options.test_samples, **columns,
    ), "test")  # fmt: skip
    base, family = open_model(config.model_name_or_path)
    batches = family.calibration_batches(base, of_family(config, family))
    model: Any = family.load(base, "float32", "cpu")
    given = [predictions(model, batch) for batch in batches]
    numel = sum(parameter.numel() for parameter in model.parameters())
    for bits in (8, 4):
        model = family.load(base, "float32", "cpu")
        skeleton = family.skeleton(base, torch.float32)
        tables = choose_tables(family, skeleton, base.name, bits)
        error, total, terms = put(model, tables), 0.0, 0
        for batch, before in zip(batches, given):
            after = predictions(model, batch)
            total += float((before.exp() * (before - after)).sum())
            terms += len(before)
        held = sum(table.nbytes for table in tables)
        rest = 2 * (numel - sum(table.numel for table in tables))
        print(json.dumps({
            "bits": bits, "bytes": held, "model_bytes": held + rest, "all_in_16_bits": 2 * numel,
            "error": error, "kl": total / terms, "tokens": terms,
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
