"""Write a plugin package with a family to begin with; as written, it passes the contract.

The files are those of `template/`, with names put in for `@…@`. The folder appears whole or not at all.
"""

import importlib.util
import keyword
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import emloc
from emloc import plugin
from emloc.artefacts.small_files import write_text
from emloc.artefacts.stage_folder import stage_folder
from emloc.errors import ConfigError
from emloc.extend.plugins import load_plugins

NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
LONGEST = 40

FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    ".gitignore": "gitignore",
    ".github/workflows/test.yml": "ci.yml",
    "src/@package@_hooks.py": "src/hooks.py",
    "src/@package@/__init__.py": "src/init.py",
    "src/@package@/family.py": "src/family.py",
    "src/@package@/example.py": "src/example.py",
    "tests/test_family.py": "tests/test_family.py",
}
"""The templates of the files, without `.in`, by the names that the files get."""


def write_new_family(name: str, output_dir: Path | None = None) -> Path:
    """Write the package of a family; returns its folder.

    Args:
        name: of the family, as `encoder` or `speech-to-text`.
        output_dir: a new folder; by default `emloc-NAME` here.

    Raises:
        ConfigError: nothing can have the name, or something has it already.
        OutputError: the folder exists, or cannot be written.
    """
    words = _words(name)
    target = Path(words["dist"]) if output_dir is None else output_dir
    template = files("emloc.new_family").joinpath("template")
    with stage_folder(target, {"new_family": name, "emloc": emloc.__version__}) as folder:
        for file, source in FILES.items():
            path = folder / _filled(file, words)
            path.parent.mkdir(parents=True, exist_ok=True)
            text = template.joinpath(f"{source}.in").read_text("utf-8")
            write_text(path, _filled(text, words))
    return target


def _words(name: str) -> Mapping[str, str]:
    """The words of the templates, by name."""
    if not NAME.fullmatch(name) or len(name) > LONGEST:
        raise ConfigError(
            f"new-family: {name[: LONGEST + 20]!r} is not a family name; pass at most {LONGEST} small "
            f"letters, digits and single hyphens, a letter first, as in speech-to-text."
        )
    module = name.replace("-", "_")
    package, kind = f"emloc_{module}", "".join(part.title() for part in module.split("_"))
    known = load_plugins().families
    if name in known:
        raise ConfigError(
            f"new-family: the family {name} already exists, from the plugin {known[name].plugin}; choose "
            f"another name."
        )
    if any(importlib.util.find_spec(one) is not None for one in (package, f"{package}_hooks")):
        raise ConfigError(
            f"new-family: a package {package} is already installed; choose another name, or uninstall it."
        )
    if f"{kind}Family" in plugin.__all__ or keyword.iskeyword(module):
        raise ConfigError(
            f"new-family: {name} would take the name of a part of Python or emloc; choose another name."
        )
    return {
        "name": name,
        "title": f"models of the kind {name}",
        "dist": f"emloc-{module.replace('_', '-')}",
        "module": module,
        "package": package,
        "class": kind,
        "versions": _versions(emloc.__version__),
    }


def _versions(version: str) -> str:
    """The versions that keep what `emloc.plugin` promises in this one."""
    major, minor = (int(part) for part in version.split(".")[:2])
    following = f"{major + 1}" if major else f"0.{minor + 1}"
    return f">={major}.{minor},<{following}"


def _filled(text: str, words: Mapping[str, str]) -> str:
    return re.sub(r"@([a-z]+)@", lambda match: words[match[1]], text)
