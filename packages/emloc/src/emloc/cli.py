"""The command line: one command per stage, its long options the stage's keywords."""

import inspect
import json
import logging
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table

import emloc
from emloc.config import nearest
from emloc.errors import EmlocError, Interrupted
from emloc.extend.plugins import Plugins, families_for, load_plugins
from emloc.machine.progress import quiet_libraries
from emloc.options.text import from_command_line
from emloc.stages.boundary import DEBUG, boundary
from emloc.stages.registry import AnyStage, all_stages

UsageError: Any = typer.BadParameter.__bases__[0]
"""Usage errors of click, or of the copy of it in typer."""

_ON_ERRORS = f"With {DEBUG}, an error is shown with its traceback."

app = typer.Typer(
    name="emloc",
    help="Fine-tune a model within the memory of running it: compress, train, correct.",
    epilog=_ON_ERRORS,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes would cut the options' names
)


def main() -> None:
    """Entry point: every refusal is one sentence on standard error and an exit code of its kind."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    # Libraries announce their own renamings to whoever calls them; that is us, not the user.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")
    quiet_libraries()
    words = [word for word in sys.argv[1:] if word != DEBUG]
    try:
        with boundary("emloc"):
            code = _called(words)
    except EmlocError as problem:
        if len(words) < len(sys.argv) - 1:
            traceback.print_exception(problem)
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
    sys.exit(code)


def _called(words: Sequence[str]) -> int:
    """The exit code of a command line, apart from errors."""
    build_app(load_plugins())
    try:
        code = app(_with_flags(words), standalone_mode=False)
    except UsageError as problem:
        print(_usage(problem), file=sys.stderr)
        return problem.exit_code
    return code if isinstance(code, int) else 0


def _with_flags(words: Sequence[str]) -> list[str]:
    """The words of a command line, with `--packing true` or `false` as the flags that they mean."""
    flags = {
        f"--{name}"
        for stage in all_stages().values()
        for name, field in stage.config.model_fields.items()
        if field.annotation is bool
    }
    made: list[str] = []
    for word in words:
        value = word.lower()
        if made and made[-1] in flags and value in ("true", "false"):
            made[-1] = made[-1] if value == "true" else f"--no_{made[-1].removeprefix('--')}"
        else:
            made.append(word)
    return made


def _usage(problem: Any) -> str:
    """One sentence for a command line that cannot be read; the help, where nothing was asked for."""
    message: str = problem.format_message()
    if "\n" in message:
        return message
    command = problem.ctx.info_name if problem.ctx else "emloc"
    option = str(getattr(problem, "option_name", "") or "").lstrip("-")
    if not option:
        return f"error: {command}: {message[0].lower()}{message[1:].rstrip('.')}; see --help."
    if command in ("run", "bench"):
        return f"error: {command}: options are given as {option}=VALUE, without dashes; see --help."
    stages = all_stages()
    owners = [name for name, stage in stages.items() if option in stage.config.model_fields]
    own = stages[command].config.model_fields if command in stages else {}
    hint = f" It is one of {' and '.join(owners)}." if owners else nearest(option, list(own))
    return f"error: {command}: there is no option {option}.{hint}"


@contextmanager
def _interruptible() -> Iterator[None]:
    """Typer would turn Ctrl-C into `Aborted!`, which says nothing about what is left."""
    try:
        yield
    except KeyboardInterrupt as problem:
        raise Interrupted(
            "Interrupted; nothing is left half written, and the same command continues where it can."
        ) from problem


def build_app(plugins: Plugins) -> None:
    """Add the stages, `run`, `new-family`, `families`, `methods` and the plugins' own commands."""
    for name, stage in all_stages(plugins).items():
        app.command(name, epilog=_ON_ERRORS)(_command(stage))
    app.command("run", epilog=_ON_ERRORS)(_run)
    app.command("new-family", epilog=_ON_ERRORS)(_new_family)

    @app.command("families")
    def families() -> None:  # pyright: ignore[reportUnusedFunction]
        """List the installed model families."""
        table = Table("family", "plugin", "what it handles")
        for entry in plugins.families.values():
            table.add_row(entry.name, entry.plugin, entry.summary)
        Console().print(table)
        for name, why in plugins.broken.items():
            print(f"plugin {name} is broken and was left out: {why}", file=sys.stderr)

    @app.command("methods")
    def methods() -> None:  # pyright: ignore[reportUnusedFunction]
        """List the installed methods: EMLoC and those that it is compared with."""
        table = Table("method", "plugin", "families", "what it does")
        for entry in plugins.methods.values():
            where = ", ".join(families_for(entry, plugins.families)) if entry.needs else "all"
            table.add_row(entry.name, entry.plugin, where, entry.summary)
        Console().print(table)

    for name, plugin in plugins.manager.list_name_plugin():
        others = [other for other in plugins.manager.get_plugins() if other is not plugin]
        try:
            plugins.manager.subset_hook_caller("emloc_register_commands", others)(app=app)
        except Exception as problem:  # a third party's code may raise anything
            plugins.broken[name] = f"{type(problem).__name__}: {problem}"


def _command(stage: AnyStage) -> Any:
    """A function whose parameters are the stage's options, for typer to read."""
    name, model = stage.name, stage.config

    def call(**given: Any) -> None:
        as_table = name == "plan" and not given.pop("json")
        with _interruptible():
            fields = stage.fields
            outcome = stage(
                **{
                    key: from_command_line(fields[key], value)
                    for key, value in given.items()
                    if value is not None
                }
            )
        if name == "demo":
            return  # its own last line says what to try next
        if as_table:
            from emloc.planning.report import report

            Console().print(report(outcome))
        elif isinstance(outcome, Path):
            print(outcome)
        else:
            print(json.dumps(outcome, indent=2, ensure_ascii=False))

    parameters: list[inspect.Parameter] = []
    for field_name, field in stage.fields.items():
        annotation = Annotated[_option_type(field), _option(field_name, field)]
        parameters.append(
            inspect.Parameter(
                field_name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.is_required() else None,
                annotation=annotation,
            )
        )
    if name == "plan":
        parameters = _plan_parameters(parameters)
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__doc__ = inspect.cleandoc(model.__doc__ or "")
    return call


def _plan_parameters(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    """The model is named without an option, and what is printed can be chosen."""
    named = Annotated[str, typer.Argument(help="local folder or hub id", metavar="MODEL")]
    as_json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
    others = [p for p in parameters if p.name != "model_name_or_path"]
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter("model_name_or_path", kind, annotation=named),
        *others,
        inspect.Parameter("json", kind, default=False, annotation=as_json),
    ]


def _option_type(field: FieldInfo) -> Any:
    """Typer reads booleans as flags; all else stays text for pydantic to parse."""
    kind: Any = bool if field.annotation is bool else str
    return kind if field.is_required() else (kind | None)


def _option(name: str, field: FieldInfo) -> Any:
    names = [f"--{name}/--no_{name}"] if field.annotation is bool else [f"--{name}"]
    default = None if field.is_required() else field.get_default()
    shown = "" if field.is_required() or default in (None, [], {}) else f" [default: {default}]"
    help_text = (field.description or "") + shown
    metavar = None if field.annotation is bool else _metavar(field.annotation)
    return typer.Option(*names, help=help_text, metavar=metavar, show_default=False)


def _metavar(annotation: Any) -> str:
    """`INTEGER`, `a|b`, …: what an option takes, as its help shows it."""
    if get_origin(annotation) is Annotated:
        return _metavar(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [_metavar(part) for part in get_args(annotation) if part is not type(None)]
        return "|".join(parts)
    if get_origin(annotation) is typing.Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) is list:
        return "A,B,…"
    if get_origin(annotation) is dict:
        return "NAME=VALUE,…"
    return {int: "INTEGER", float: "FLOAT", Path: "PATH"}.get(annotation, "TEXT")


def _run(
    config: Annotated[Path, typer.Argument(help="YAML file with a section per stage")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value or stage.key=value, …")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", help="memory of the device, such as 24GiB: choose settings that fit"
        ),
    ] = None,
) -> None:
    """Run all stages that a YAML file asks for, skipping those already complete."""
    with _interruptible():
        given = [] if memory is None else [f"memory={memory}"]
        outcome = emloc.run(config, *(overrides or []), *given)
    shown = {k: str(v) if isinstance(v, Path) else v for k, v in outcome.items()}
    print(json.dumps(shown, indent=2, ensure_ascii=False))


def _new_family(
    name: Annotated[str, typer.Argument(help="name of the family, such as encoder")],
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="a new folder; by default emloc-NAME")
    ] = None,
) -> None:
    """Write a starter package for a model family of your own, with its tests."""
    from emloc.new_family.writer import write_new_family

    with _interruptible():
        folder = write_new_family(name, output_dir)
    print(folder)
    print(
        f"Next: pip install -e '{folder}[test]' && pytest {folder}; its README.md says what to change."
    )
