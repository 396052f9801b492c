"""Options that the stages of a run give each other: folders of what one made and another takes.

Of the stages before it that run, a stage is given the artefact of the last one that makes the kind it takes.
What the run's file names for an option is the start instead: nothing made anew takes its place, and only what
a stage of the run made of it goes on.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from emloc.artefacts.kinds import Kind
from emloc.stages.registry import AnyStage


def fed(
    stage: AnyStage, before: Sequence[AnyStage], root: Path, named: Collection[str]
) -> dict[str, str]:
    """The options that a stage is given, its `output_dir` among them.

    Args:
        before: the stages of the run that come before it, in order.
        root: the run's folder.
        named: options that the run's file has at its top.
    """
    options = {"output_dir": str(root / stage.folder)}
    for option, kinds in stage.consumes.items():
        maker = _maker(kinds, before)
        if maker is not None and (option not in named or maker.repairs):
            options[option] = str(root / maker.folder)
    return options


def without_replaced(
    stage: AnyStage, options: Mapping[str, object], own: Collection[str]
) -> dict[str, object]:
    """Options without those that another one takes the place of, unless they are the stage's own."""
    replaced = {
        other for other, given in stage.instead.items() if given in options and other not in own
    }
    return {name: value for name, value in options.items() if name not in replaced}


def _maker(kinds: Sequence[Kind], before: Sequence[AnyStage]) -> AnyStage | None:
    for kind in kinds:
        for stage in reversed(before):
            if stage.produces == kind:
                return stage
    return None
