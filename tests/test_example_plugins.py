"""The plugins of `examples/plugins`: built, installed into a fresh environment, held to the contract."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from fresh_environment import ROOT, FreshEnvironment, shared_core

PLUGINS = ROOT / "examples/plugins"
TIMM = [Path(sys.prefix) / "timm", ROOT / "packages/emloc-diffusion/tests"]
"""timm lies apart from other libraries; `torchvision_schemas` lets it be imported beside this torch."""

RUNS = {
    "emloc-encoder": ["-k", "Albert or rows"],
    "emloc-speech": [],
    "emloc-timm": ["-p", "torchvision_schemas"],
}


def test_none_is_left_out():
    assert {path.name for path in PLUGINS.iterdir()} == set(RUNS)


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_its_wheel_passes_the_contract(name, tmp_path, tmp_path_factory):
    environment = FreshEnvironment(tmp_path / "fresh", shared_core(tmp_path_factory))
    family = name.removeprefix("emloc-")
    environment.install(PLUGINS / name, needed=family != "timm")
    tests = shutil.copytree(PLUGINS / name / "tests", tmp_path / "tests")
    more = TIMM if family == "timm" else []
    assert family in environment.run("emloc", "families", paths=more).stdout
    run = environment.run(
        "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'made'}", *RUNS[name],
        where=tests, paths=more,
    )  # fmt: skip
    assert re.search(r"\b\d\d passed", run.stdout), run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.parametrize("name", RUNS)
def test_its_family_is_short_and_imports_what_is_promised(name):
    [family] = (PLUGINS / name / "src").rglob("family.py")
    lines = {"emloc-timm": 150}.get(name, 100)
    assert len(family.read_text().splitlines()) < lines
    for path in (PLUGINS / name).rglob("*.py"):
        imported = re.findall(
            r"^\s*(?:from|import) (emloc(?:\.\w+)*)\b(?!_)", path.read_text(), re.M
        )
        if name == "emloc-timm":
            assert not re.search(
                r"^\s*(from|import) (transformers|torchvision)\b", path.read_text(), re.M
            )
        allowed = {"emloc", "emloc.plugin", "emloc.testing"}
        assert set(imported) <= allowed, f"{path}: {set(imported) - allowed}"
