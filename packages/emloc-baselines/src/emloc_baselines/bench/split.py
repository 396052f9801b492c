"""Validation rows out of the training file, so that no choice ever looks at the test data."""

import random
from pathlib import Path

from emloc.artefacts.file_digest import file_sha256
from emloc.artefacts.small_files import write_text
from emloc.errors import ConfigError, DataError


def split_rows(
    source: Path, folder: Path, validation_samples: int, max_train_samples: int | None
) -> tuple[Path, Path | None]:
    """Write the rows of a JSONL file as two files; the same rows whatever is asked for otherwise.

    Args:
        validation_samples: how many are drawn (by a fixed seed) for validation.
        max_train_samples: how many of the others are kept, in an order drawn by the same seed; None: all.

    Returns:
        The training and the validation file (None for no rows), in `folder`.

    Raises:
        ConfigError: it is no JSONL file, whose rows are its lines.
        DataError: it is not there, or has too few rows.
    """
    if not source.exists():
        raise DataError(f"bench: there is no {source}; give the data set's own path as dataset.")
    if source.suffix != ".jsonl" or not source.is_file():
        raise ConfigError(
            f"bench: {source} is not a JSONL file, so it cannot be split; give the data set its own "
            f"validation options, for example validation: {{dataset: FILE}}, or validation_samples: 0 and "
            f"one learning rate."
        )
    # JSON may have separators in it at which `splitlines` would cut a row in two.
    rows = [line for line in source.read_text("utf-8-sig").split("\n") if line.strip()]
    if len(rows) <= validation_samples:
        raise DataError(
            f"{source} has {len(rows)} rows; validation_samples asks for {validation_samples}."
        )
    order = random.Random(0).sample(range(len(rows)), len(rows))
    held_out, kept = order[:validation_samples], order[validation_samples:]
    if max_train_samples is not None:
        kept = kept[:max_train_samples]
    stem = f"{source.stem}-{file_sha256(source)[:12]}-{len(held_out)}-{len(kept)}"
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = folder / f"{stem}-train.jsonl", folder / f"{stem}-validation.jsonl"
    write_text(train, "".join(f"{rows[index]}\n" for index in sorted(kept)))
    if not held_out:
        return train, None
    write_text(validation, "".join(f"{rows[index]}\n" for index in sorted(held_out)))
    return train, validation
