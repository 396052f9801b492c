"""People install one modality: core imports none, and a plugin imports none but its own."""

import ast
import re
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it
    import tomli as tomllib

PACKAGES = Path(__file__).parent.parent / "packages"
MODALITIES = {"transformers", "peft", "trl", "diffusers", "timm", "datasets", "accelerate",
              "torchvision", "gguf", "bitsandbytes", "PIL"}  # fmt: skip
ALLOWED = {
    "emloc-llm": {"transformers", "peft", "trl", "datasets", "accelerate", "gguf"},
    "emloc-vlm": {"transformers", "peft", "datasets", "accelerate", "PIL"},
    # timm is an extra, imported where it is asked for.
    "emloc-diffusion": {"diffusers", "transformers", "peft", "accelerate", "PIL", "timm"},
    # bitsandbytes is an extra.
    "emloc-baselines": {"transformers", "peft", "accelerate", "bitsandbytes"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def test_core_names_no_modality():
    root = PACKAGES / "emloc/src/emloc"
    for path in root.rglob("*.py"):
        if "integrations" in path.relative_to(root).parts:
            continue
        for name in imports(path):
            assert name.split(".")[0] not in MODALITIES, f"{path} imports {name}"
            if path.name != "plugin.py":  # for type checkers alone; see below
                assert not name.startswith("emloc.integrations"), f"{path} imports {name}"
            assert not name.startswith("emloc_"), f"{path} imports {name}"
        assert not re.search(r"\b(llama|qwen|internvl|unet|flux)\b", path.read_text(), re.I), path


def test_means_of_testing_are_imported_by_tests_alone():
    for root in PACKAGES.glob("*/src"):
        for path in root.rglob("*.py"):
            if not path.is_relative_to(root / "emloc/testing"):
                lent = [name for name in imports(path) if name.startswith("emloc.testing")]
                assert not lent, f"{path} imports {lent}"
                assert "pytest" not in imports(path), path


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_plugin_names_its_own_modality_only(package):
    for path in (PACKAGES / package / "src").rglob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in MODALITIES - ALLOWED[package], f"{path} imports {name}"
            assert top != "torchvision"
            own = package.replace("-", "_")
            assert not top.startswith("emloc_") or top.startswith(own), f"{path} imports {name}"


def test_the_command_line_starts_without_a_modality():
    """`emloc --help` lists what plugins offer without importing what they need."""
    code = "import sys, emloc.cli; from emloc.extend.plugins import load_plugins; load_plugins();"
    code += f"print(sorted({MODALITIES!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_what_plugins_import_needs_no_modality():
    """`emloc.plugin`, with the options for text, which a module of hooks may import as well."""
    code = "import sys; from emloc.plugin import FamilyEntry, TEXT_OPTIONS, TrainingData;"
    code += f"print(sorted({MODALITIES!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_family_of_ones_own_imports_the_kit_alone():
    """A third party's family imports `emloc.plugin` alone, which its pin is about; so do our hooks."""
    for path in (
        PACKAGES.parent / "tests/classifier_family.py",
        PACKAGES.parent / "tests/seq2seq_family.py",
        *(PACKAGES.parent / "examples/plugins").glob("*/src/*/family.py"),
        *PACKAGES.glob("*/src/*_hooks.py"),
        PACKAGES / "emloc-vlm/src/emloc_vlm_options.py",
    ):
        ours = {name for name in imports(path) if name.split(".")[0] == "emloc"}
        assert ours <= {"emloc", "emloc.plugin"}, path  # `from emloc import plugin`, too


def test_requirements_pull_no_other_modality():
    def names(package):
        return {
            re.split(r"[^\w-]", line)[0].lower()
            for line in requires(package) or []
            if "extra ==" not in line
        }

    assert not names("emloc") & MODALITIES
    assert not names("emloc-llm") & {"diffusers", "timm", "torchvision", "bitsandbytes", "pillow"}
    assert not names("emloc-vlm") & {"diffusers", "timm", "torchvision", "bitsandbytes", "trl"}
    assert not names("emloc-diffusion") & {"datasets", "timm", "torchvision", "bitsandbytes", "trl"}
    assert not names("emloc-baselines") & {"trl", "datasets", "diffusers", "pillow", "bitsandbytes"}


def test_wheels_hold_what_they_promise(tmp_path):
    """What pip installs is what the checkout runs: every module, the entry point, no tests."""
    for package, expected in (
        (
            "emloc",
            {
                "emloc/cli.py",
                "emloc/plugin.py",
                "emloc/stages/compress.py",
                "emloc/compression/one_pass.py",
                "emloc/integrations/__init__.py",
                "emloc/testing/pretend_cuda.py",
            },
        ),
        ("emloc-llm", {"emloc_llm/family.py", "emloc_llm/demo/orders.py", "emloc_llm_hooks.py"}),
        (
            "emloc-vlm",
            {
                "emloc_vlm/family.py",
                "emloc_vlm/demo/base.py",
                "emloc_vlm_hooks.py",
                "emloc_vlm_options.py",
            },
        ),
        (
            "emloc-diffusion",
            {
                "emloc_diffusion/family.py",
                "emloc_diffusion/export/kohya_format.py",
                "emloc_diffusion_hooks.py",
                "emloc_diffusion_options.py",
            },
        ),
        (
            "emloc-baselines",
            {
                "emloc_baselines/lora.py",
                "emloc_baselines/bench/harness.py",
                "emloc_baselines_hooks.py",
            },
        ),
    ):
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir",
             str(tmp_path), str(PACKAGES / package)],
            check=True, capture_output=True,
        )  # fmt: skip
        [wheel] = tmp_path.glob(f"{package.replace('-', '_')}-0*.whl")
        names = set(zipfile.ZipFile(wheel).namelist())
        assert expected <= names
        ours = ("emloc/testing/", "emloc/new_family/template/")
        assert not any("test" in name for name in names if not name.startswith(ours))
        source = PACKAGES / package / "src"
        assert {str(p.relative_to(source)) for p in source.rglob("*.in")} <= names
        assert {str(p.relative_to(source)) for p in source.rglob("*.py")} <= names


def test_the_workspace_is_declared():
    """uv reads the members; the root itself is no package."""
    root = tomllib.loads((PACKAGES.parent / "pyproject.toml").read_text())
    assert "project" not in root
    assert root["tool"]["uv"]["workspace"]["members"] == ["packages/*"]
    for path in PACKAGES.glob("*/pyproject.toml"):
        project = tomllib.loads(path.read_text())["project"]
        assert root["tool"]["uv"]["sources"][project["name"]] == {"workspace": True}
        assert project["requires-python"] == ">=3.10"
        assert project["license"] == "Apache-2.0"


def _tensor_names(path):
    """`left` and `right` as strings or attributes."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in ("left", "right"):
            yield node.value
        if isinstance(node, ast.Attribute) and node.attr in ("left", "right"):
            yield node.attr


# Files in which the words mean something else.
OTHER_LEFTS = {
    # rich's tables and rules
    "emloc/machine/progress.py", "emloc/planning/report.py", "emloc/demos/report.py",
    # matplotlib's spines
    "emloc_baselines/bench/plots.py",
    # the side that a tokenizer pads on
    "emloc_vlm/encode.py",
    # hidden states that left a block
    "emloc/streaming/block_gradients.py", "emloc_baselines/distillation.py",
}  # fmt: skip


def test_only_formats_and_their_layers_know_the_names_of_stored_tensors():
    """Mathematics has factors too, which are stored nowhere."""
    free = ("emloc/formats/", "emloc/layers/", "emloc/linalg/")
    seen = set()
    for root in PACKAGES.glob("*/src"):
        for path in root.rglob("*.py"):
            name = str(path.relative_to(root))
            if name.startswith(free):
                continue
            low_rank = [n for n in imports(path) if n.startswith("emloc.layers.low_rank")]
            assert not low_rank, f"{path} imports {low_rank}"
            if any(_tensor_names(path)):
                seen.add(name)
    assert seen == OTHER_LEFTS
