"""Every installed family with its example on disk, for the contract that all must pass."""

import os

import pytest

import emloc
from emloc.extend.plugins import load_plugins

os.environ["HF_HUB_OFFLINE"] = "1"

FAMILIES = sorted(load_plugins().families)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    """One family object."""
    return load_plugins().families[request.param].load()


@pytest.fixture(scope="session")
def example(family, tmp_path_factory):
    """The family's own tiny checkpoint and data: options that every stage accepts."""
    return dict(family.write_example(tmp_path_factory.mktemp(f"{family.name}-example"), seed=0))


@pytest.fixture(scope="session")
def stages(family, example, tmp_path_factory):
    """The folders of all stages, run through the public functions and held to a GiB."""
    memory = {"memory": "1GiB"}
    root = tmp_path_factory.mktemp(f"{family.name}-stages")
    data = {key: value for key, value in example.items() if key != "model_name_or_path"}
    emulator = emloc.compress(output_dir=root / "emulator", keep_ratio=0.5, **example, **memory)
    adapter = emloc.train(
        emulator=str(emulator), output_dir=root / "adapter", max_steps=2, logging_steps=1,
        save_steps=1, learning_rate=1e-2, lora_r=3, **data, **memory,
    )  # fmt: skip
    corrected = emloc.correct(
        adapter=str(adapter), emulator=str(emulator), output_dir=root / "corrected", limit="none",
        **data, **memory,
    )  # fmt: skip
    merged = emloc.merge(adapter=str(corrected), output_dir=root / "merged", **memory)
    return {"emulator": emulator, "adapter": adapter, "corrected": corrected, "merged": merged}
