"""Every installed family with its example on disk, for the contract that all must pass.

So must a family of one's own (`classifier_family`), whose plugin is installed while its turn lasts.
"""

import importlib.metadata
import os
from pathlib import Path

import pytest

import emloc
from emloc.extend import plugin_options
from emloc.extend.capabilities import example_of
from emloc.extend.plugins import load_plugins

OWN = importlib.metadata.EntryPoint("classifier", "classifier_family", "emloc")

os.environ["HF_HUB_OFFLINE"] = "1"

FAMILIES = [*sorted(load_plugins().families), OWN.name]


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    """One family object."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == OWN.name:
            _install(patch)
        _forget_options()
        yield load_plugins().families[request.param].load()
    _forget_options()


def _install(patch):
    """Have the plugin of `classifier_family` discovered like any other."""
    real = importlib.metadata.entry_points

    def entry_points(**given):
        return [*real(**given), OWN] if given.get("group") == "emloc" else real(**given)

    patch.setattr(importlib.metadata, "entry_points", entry_points)
    patch.syspath_prepend(Path(__file__).parent)


def _forget_options():
    """Which options stages have depends on the plugins."""
    plugin_options.with_plugin_options.cache_clear()
    plugin_options._by_family.cache_clear()


@pytest.fixture(scope="session")
def example(family, tmp_path_factory):
    """The family's own tiny checkpoint and data: options that every stage accepts."""
    return example_of(family, tmp_path_factory.mktemp(f"{family.name}-example"))


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
