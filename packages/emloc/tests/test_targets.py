"""Targets of plugin entries: what is imported, and that nothing is collected meanwhile."""

import gc
import importlib

import pytest

from emloc.machine.targets import imported

MODULE = """
import gc
collected = gc.isenabled()

class Family:
    pass

family = Family()
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    name = f"target_of_{request.node.name.split('[')[0]}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("import nothing_of_that_name")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return name


def test_a_class_is_made_an_object_and_an_object_stays(module):
    assert type(imported(f"{module}:Family")).__name__ == "Family"
    assert imported(f"{module}:family") is imported(f"{module}:family")


def test_nothing_is_collected_while_it_is_imported_and_again_after(module):
    assert gc.isenabled()
    assert imported(f"{module}:collected") is False
    assert gc.isenabled()
    with pytest.raises(ImportError, match="nothing_of_that_name"):
        imported(f"{module}_broken:family")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off(module):
    gc.disable()
    try:
        imported(f"{module}:family")
        assert not gc.isenabled()
    finally:
        gc.enable()
