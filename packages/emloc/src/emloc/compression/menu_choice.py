"""Forms that are known after the pass (`format=auto`): all candidates are written, and one per layer is kept.

The pass fits every form of a layer's menu, and measures once how much the block's output minds the layer's
error (`emloc.compression.sensitivity`). A form's predicted error is that sensitivity times the square of its
own error over the square of the measured one's. When all blocks are through, bytes are allocated
(`emloc.linalg.menu_allocation`), and block after block is written with what was chosen. Memory is one block.

A block's candidates wait in a file of their own, which goes once the block is written. Forms follow from the
reports alone: a run that is killed here ends with the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.shard_writer import ShardWriter
from emloc.artefacts.small_files import write_json
from emloc.compression.emulator_folder import MENU, EmulatorFolder
from emloc.compression.groups import CompressionPlan, Group
from emloc.compression.sensitivity import BlockProbe
from emloc.extend.formats import Forms
from emloc.formats.layer_format import Form, GroupShape, Tensors, tensor_bytes
from emloc.formats.menu import REFERENCE, grid_form
from emloc.linalg.gram import Moments
from emloc.linalg.menu_allocation import Option, allocate_bytes
from emloc.machine.progress import console, progress_bar

DENSE = "a dense weight lowers the error more than its bytes do elsewhere"


def fit_menu(
    group: Group, weights: Sequence[Tensor], moments: Moments, probe: BlockProbe, itemsize: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fit all forms of a group's layers.

    Args:
        itemsize: bytes of an element of a dense weight in the emulator.

    Returns:
        Tensors by `candidate_name`, and each layer's options and sensitivity, as JSON.
    """
    tensors: dict[str, Tensor] = {}
    menus: dict[str, Any] = {}
    for shape, weight, forms in zip(group.shape.singles(), weights, group.menu):
        options: list[dict[str, Any]] = []
        measured: tuple[float, float] | None = None
        for place, form in enumerate(forms):
            fitted = form.format.fit([weight], moments, shape, form)
            error = float(fitted.report["relative_error"])
            options.append(
                {
                    **form.as_json(),
                    "bytes": tensor_bytes(shape, form, itemsize),
                    "relative_error": error,
                }
            )
            for (layer, name), tensor in fitted.tensors.items():
                tensors[candidate_name(layer, place, name)] = tensor
            if form == grid_form(*REFERENCE) or measured is None:
                stood = _decoded(shape, form, fitted.tensors, weight)
                measured = error, probe.sensitivity([shape.owner], [stood])
        assert measured is not None
        menus[shape.owner] = {
            "options": options,
            "dense_bytes": shape.numel * itemsize,
            "sensitivity": measured[1],
            "at_error": measured[0],
            "d_out": list(shape.d_out),
            "d_in": shape.d_in,
            "side": moments.side,
            "tokens": moments.tokens,
        }
    return tensors, menus


def candidate_name(layer: str, place: int, name: str) -> str:
    """A tensor of the form at that place of a layer's menu."""
    return f"{place}:{layer}:{name}"


def _decoded(shape: GroupShape, form: Form, tensors: Tensors, like: Tensor) -> Tensor:
    def read(layer: str, name: str) -> Tensor:
        return tensors[layer, name]

    return form.format.operator(shape, form, shape.owner, read).dense(like.dtype)


def candidates_path(folder: EmulatorFolder, block: str) -> Path:
    """The file of a block's candidates."""
    return folder.report_path(block).with_suffix(".candidates.safetensors")


def write_candidates(
    folder: EmulatorFolder, block: str, tensors: Mapping[str, Tensor], report: Mapping[str, Any]
) -> None:
    """Write a block's candidates, then the report by which it is done."""
    path = candidates_path(folder, block)
    declared = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with ShardWriter(path, declared, folder.base.name) as shard:
        for name, tensor in tensors.items():
            shard.write(name, tensor)
    write_json(folder.report_path(block), report)


def choose_forms(folder: EmulatorFolder, share_of: Mapping[str, float]) -> dict[str, float]:
    """Choose a form for every layer, and write all blocks with what was chosen.

    Args:
        share_of: the share of its dense bytes that each group's owner brings to the budget.

    Returns:
        The predicted error of the hidden state, and bits per weight.
    """
    menus: dict[str, dict[str, Any]] = {}
    for block in folder.stream.blocks:
        menus |= folder.read_report(block).get(MENU, {})
    owner_of = {layer: group.owner for group in folder.plan.groups for layer in group.layers}
    budget = int(sum(share_of[owner_of[n]] * menu["dense_bytes"] for n, menu in menus.items()))
    options = {name: options_of(menu) for name, menu in menus.items()}
    places = allocate_bytes(options, budget)
    chosen = {name: (menus[name], place) for name, place in places.items()}
    folder.plan = _with_chosen(folder.plan, chosen)
    error = sum(options[name][place].error for name, place in places.items()) ** 0.5
    spent = sum(options[name][place].bytes for name, place in places.items())
    weights = sum(sum(menu["d_out"]) * menu["d_in"] for menu in menus.values()) or 1
    console.print(
        f"compress: {_summary(chosen)}; {8 * spent / weights:.2f} bits per weight; predicted error of the "
        f"hidden state {error:.4f}"
    )
    with progress_bar("choose", len(folder.stream.blocks)) as advance:
        for block in folder.stream.blocks:
            _write_chosen(folder, block, places)
            advance(note=block)
    return {"chosen": error, "bits_per_weight": 8 * spent / weights}


def options_of(menu: Mapping[str, Any]) -> list[Option]:
    """Bytes and predicted errors of a layer's forms, the dense weight last."""
    unit = menu["sensitivity"] / menu["at_error"] ** 2 if menu["at_error"] > 0 else 0.0
    made = [Option(o["bytes"], unit * o["relative_error"] ** 2) for o in menu["options"]]
    return [*made, Option(menu["dense_bytes"], 0.0)]


def _with_chosen(
    plan: CompressionPlan, chosen: Mapping[str, tuple[Mapping[str, Any], int]]
) -> CompressionPlan:
    """Groups of single layers in the forms that were chosen; those that stay dense are in no group."""
    forms, groups, dense = Forms(), list[Group](), dict(plan.kept_dense)
    for group in plan.groups:
        if not group.menu:
            groups.append(group)
            continue
        for shape in group.shape.singles():
            if shape.owner not in chosen:  # no token reached it
                groups.append(replace(group, shape=shape, menu=()))
                continue
            menu, place = chosen[shape.owner]
            if place == len(menu["options"]):
                dense[shape.owner] = DENSE
            else:
                groups.append(Group(shape, forms.of_manifest(menu["options"][place])))
    return replace(plan, groups=tuple(groups), kept_dense=dense)


def _write_chosen(folder: EmulatorFolder, block: str, places: Mapping[str, int]) -> None:
    report = folder.read_report(block)
    path = candidates_path(folder, block)
    if "sha256" in report:  # written before the run was killed
        path.unlink(missing_ok=True)
        return
    candidates = Checkpoint.from_files(str(folder.work), folder.work, {}, {path.name: None})
    fitted: dict[str, Tensors] = dict(_uniform(folder, block, candidates))
    layers: dict[str, Any] = dict(report["layers"])
    for group in folder.plan.within(block):
        menu = report[MENU].get(group.owner)
        if menu is None:
            continue
        place = places[group.owner]
        names = [stored.name for stored in group.form.format.stored(group.shape, group.form)]
        fitted[group.owner] = {
            (group.owner, name): candidates.read(candidate_name(group.owner, place, name))
            for name in names
        }
        said = {k: v for k, v in menu["options"][place].items() if k != "bytes"}
        about = {k: menu[k] for k in ("d_out", "d_in", "side", "tokens", "sensitivity")}
        layers[group.owner] = {"layers": list(group.layers), **said, **about}
    folder.write_block(block, fitted, {**report, "layers": layers})
    path.unlink()


def _uniform(
    folder: EmulatorFolder, block: str, candidates: Checkpoint
) -> list[tuple[str, Tensors]]:
    """Groups of the block whose form was known before the pass; they wait at place 0."""
    known: list[tuple[str, Tensors]] = []
    for group in folder.plan.within(block):
        stored = group.form.format.stored(group.shape, group.form)
        names = {(one.layer, one.name): candidate_name(one.layer, 0, one.name) for one in stored}
        if group.owner in folder.read_report(block)["layers"]:
            known.append((group.owner, {key: candidates.read(n) for key, n in names.items()}))
    return known


def _summary(chosen: Mapping[str, tuple[Mapping[str, Any], int]]) -> str:
    """`40 layers at 2 bits, 100 at 3, 3 dense`."""
    counts: dict[str, int] = {}
    for menu, place in chosen.values():
        dense = place == len(menu["options"])
        kind = "dense" if dense else f"at {menu['options'][place]['bits']} bits"
        counts[kind] = counts.get(kind, 0) + 1
    parts = [f"{count} {kind}" for kind, count in sorted(counts.items())]
    return "layers: " + ", ".join(parts)
