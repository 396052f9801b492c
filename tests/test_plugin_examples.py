"""The plugins in `examples/plugins` pass their tests, and import what is promised."""

import ast
import re
import sys
from pathlib import Path

import pytest
from elsewhere import run_pytest

ROOT = Path(__file__).parent.parent
TIMM = ROOT / "examples/plugins/emloc-timm"
TIMM_ITSELF = Path(sys.prefix) / "timm"
SCHEMAS = ROOT / "packages/emloc-diffusion/tests"
"""The folder of `torchvision_schemas`, which lets timm be imported beside a torch of another build."""


@pytest.mark.long
def test_timm_passes_the_contract(tmp_path):
    paths = [TIMM / "src", TIMM_ITSELF, SCHEMAS]
    words = ["-p", "torchvision_schemas", "-c", TIMM / "pyproject.toml", "-rs", TIMM / "tests"]
    run = run_pytest(tmp_path, *words, f"--basetemp={tmp_path / 'made'}", paths=paths)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\b[3-9]\d passed", run.stdout), run.stdout
    assert "skipped" not in run.stdout


def test_timm_is_short_and_imports_nothing_else_of_emloc_and_no_transformers():
    imported = set()
    for path in TIMM.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [
                    f"{node.module}.{n.name}" if node.module == "emloc" else node.module
                    for n in node.names
                ]
                imported.update(names)
            elif isinstance(node, ast.Import):
                imported.update(name.name for name in node.names)
    assert {name for name in imported if name.split(".")[0] == "emloc"} == {
        "emloc.plugin",
        "emloc.testing",
    }
    assert not {name for name in imported if name.split(".")[0] in ("transformers", "torchvision")}
    assert len((TIMM / "src/emloc_timm/family.py").read_text().splitlines()) < 150
