"""Docstrings can be read where a tool shows them alone: they begin with a noun phrase or a verb."""

import ast
import re
from itertools import pairwise
from pathlib import Path

PACKAGES = Path(__file__).parent.parent / "packages"
DEPENDENT = re.compile(
    r"^(?:What|Which|Whose|Who|Where|When|Whether|Why|How|Those|These|Their|Theirs|They|Its|It|Of|By|As|In|To|"
    r"From|For|If|With|On|At|So|And|But|Also|Because|None|Not|No)\b"
)
"""Beginnings that lean on a name that stands beside them."""


def docstrings(tree):
    """Docstrings of modules, classes and functions, and the strings below assigned names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "module"), text
        body = getattr(node, "body", None)
        for first, second in pairwise(body) if isinstance(body, list) else ():
            assigned = isinstance(first, ast.Assign | ast.AnnAssign)
            if assigned and isinstance(second, ast.Expr) and isinstance(second.value, ast.Constant):
                target = first.targets[0] if isinstance(first, ast.Assign) else first.target
                yield ast.unparse(target), str(second.value.value)


def test_they_stand_alone():
    leaning = [
        f"{path.relative_to(PACKAGES)}: {name}: {text.splitlines()[0]}"
        for path in sorted(PACKAGES.glob("*/src/**/*.py"))
        for name, text in docstrings(ast.parse(path.read_text()))
        if DEPENDENT.match(text.strip())
    ]
    assert not leaning, "\n".join(leaning)


def test_results_have_names_of_their_own():
    """`found` says that something was looked for, and not what it is."""
    named = [
        f"{path.relative_to(PACKAGES)}:{node.lineno}"
        for path in sorted(PACKAGES.glob("*/src/**/*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Name) and node.id == "found")
        or (isinstance(node, ast.arg) and node.arg == "found")
    ]
    assert not named, "\n".join(named)
