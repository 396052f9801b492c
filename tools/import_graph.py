"""Print which folders and modules of the packages import which, and every circle, from the source alone.

    python tools/import_graph.py [PACKAGES_FOLDER]

A module imports another at once (when it is imported itself), late (inside a function), or for types alone
(under `TYPE_CHECKING`). The three are told apart: a late import breaks a circle for Python, and not for a
reader. A package's `__init__` counts where it is imported from by name.
"""

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

KINDS = ("at once", "late", "types")

Graph = dict[str, dict[str, str]]
"""By module the modules that it imports, each with how."""


def modules(packages: Path) -> dict[str, Path]:
    """Every module below `packages/*/src`, by its dotted name."""
    named: dict[str, Path] = {}
    for source in sorted(packages.glob("*/src")):
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def graph(named: Mapping[str, Path]) -> Graph:
    """Imports among the modules; the strongest kind counts where there are several."""
    arrows: Graph = {}
    for name, path in named.items():
        own: dict[str, str] = {}
        for target, kind in _imports(ast.parse(path.read_text("utf-8")), named):
            before = own.get(target, kind)
            if target != name:
                own[target] = min(before, kind, key=KINDS.index)
        arrows[name] = own
    return arrows


def _imports(tree: ast.Module, named: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    def visit(node: ast.AST, kind: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, kind) for alias in node.names if alias.name in named)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                target = inner if inner in named else node.module
                if target in named:
                    yield target, kind
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, "types")
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, "late" if function and kind == "at once" else kind)

    yield from visit(tree, "at once")


def circles(arrows: Graph, kinds: Sequence[str]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan's algorithm), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target, kind in arrows.get(name, {}).items():
            if kind not in kinds:
                continue
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            at = stack.index(name)
            component, stack[at:] = stack[at:], []
            if len(component) > 1:
                components.append(sorted(component))

    for name in arrows:
        if name not in index:
            visit(name)
    return sorted(components)


def folder_of(name: str) -> str:
    """The second level of a package's tree: a folder or a module, or the package itself."""
    return ".".join(name.split(".")[:2])


def by_folder(arrows: Graph) -> Graph:
    """The same graph among folders; how counts as its strongest arrow."""
    folders: Graph = {}
    for name, targets in arrows.items():
        own = folders.setdefault(folder_of(name), {})
        for target, kind in targets.items():
            other = folder_of(target)
            if other != folder_of(name):
                own[other] = min(own.get(other, kind), kind, key=KINDS.index)
    return folders


def main() -> None:
    """Print folders with their arrows, then circles of folders and of modules."""
    packages = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "packages"
    named = modules(packages)
    arrows = graph(named)
    folders = by_folder(arrows)
    for folder, targets in sorted(folders.items()):
        count = sum(folder_of(name) == folder for name in named)
        print(f"{folder} ({count} modules)")
        for kind in KINDS:
            there = sorted(target for target, how in targets.items() if how == kind)
            if there:
                print(f"    {kind}: {', '.join(there)}")
    total = sum(map(len, arrows.values()))
    between = sum(map(len, folders.values()))
    print(f"\n{len(folders)} folders and modules beside them, {between} arrows between them")
    print(f"{len(named)} modules, {total} arrows between them")
    for level, what in ((folders, "folders and modules beside them"), (arrows, "modules")):
        for kinds in (KINDS[:1], KINDS[:2], KINDS):
            rings = circles(level, kinds)
            print(f"\ncircles of {what} by imports {' or '.join(kinds)}: {len(rings)}")
            for ring in rings:
                print(f"    {' '.join(ring)}")


if __name__ == "__main__":
    main()
