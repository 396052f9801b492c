"""The forms of all layers under one budget (`format=auto`): a first pass prices them, a second one fits.

The first pass knows, of every layer, what each form of its menu would do to its outputs. Rounding with
feedback (`emloc.linalg.rounding`) makes input k cost `R_kk²` times its own squared error, whatever is carried
on, so that the error of a form follows from the spread of the weights under these costs, and a few hundred
rows tell. One form of 3 bits is followed through: it says by how much the others are off, and what residuals
take away. Once per layer it is measured how much its block's output minds such an error
(`emloc.compression.sensitivity`). Bytes are allocated by both
(`emloc.linalg.menu_allocation`), and the second pass is that of any plan whose forms are known.

Prices are written block by block; a run that is killed goes on, and ends with the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.artefacts.json_files import read_json
from emloc.artefacts.small_files import write_json
from emloc.compression.groups import CompressionPlan, Group
from emloc.compression.one_pass import Passed, stream_moments, weights_of
from emloc.compression.output_gradients import OutputGradients
from emloc.extend.family import Batch
from emloc.formats.layer_format import Form, GroupShape, tensor_bytes
from emloc.formats.quantized import QUANTIZED
from emloc.formats.trellis_matrix import advise
from emloc.linalg.finite import refuse_not_finite
from emloc.linalg.gram import Moments
from emloc.linalg.grid import grid_error
from emloc.linalg.leading_energy import left_by_rank
from emloc.linalg.menu_allocation import Option, allocate_bytes
from emloc.linalg.rounding import Feedback, squared_change, squared_output
from emloc.linalg.trellis import TRELLIS_BITS, least_steps
from emloc.linalg.trellis_rounding import fitted_trellis_bytes, trellis_error, trellis_values
from emloc.machine.progress import console
from emloc.streaming.stream import UnitStream

DENSE = "its bytes lower the error more here, kept dense, than elsewhere"

PRICED_ROWS = 256
"""Rows of a weight by which forms are priced."""

REFERENCE = (3, 128)
"""Bits and group size at which it is measured how much a block minds a layer's error."""

TOKENS_PER_RANK = 8
"""Tokens that a layer has read for each rank of a residual, at least: fewer say too little of the directions
that are dear, and factors would be fitted to them alone."""

Menus = Mapping[str, Mapping[str, Any]]
"""A layer's options, by its name: `forms` of its menu, with their `bytes` and relative squared `errors`;
`dense_bytes`; its `sensitivity`: what its block's output loses per relative squared error, None where that
did not show (an expert that the tokens of the probe did not choose), with gradients by how much the loss
rises; and the whole menu, `offered`, by which prices of another version are told apart."""


def price_menus(
    stream: UnitStream,
    plan: CompressionPlan,
    batches: Sequence[Batch],
    itemsizes: Mapping[str, int],
    work: Path,
    minded: OutputGradients | None = None,
) -> Menus:
    """Price the forms of all layers that calibration tokens reach.

    Args:
        itemsizes: bytes of an element of a group's dense weights in the emulator, by owner.
        work: folder of the prices.
        minded: gradients that tell how much the loss minds a layer's error; None: its block's output tells.

    Raises:
        NumericalError: a weight or an activation is NaN; names the layer.
        ConfigError: see `stream_moments`.
    """
    advise(stream.device)
    paths = {b: work / f"menu-{n + 1:05d}.json" for n, b in enumerate(stream.blocks)}

    def finish(passed: Passed) -> None:
        menus: dict[str, Any] = {}
        for group in plan.within(passed.block):
            moments = passed.moments.get(group.source)
            if group.menu and moments is not None and moments.tokens:
                moments.rows = None if minded is None else minded.of(group)
                minds = _by_block(passed) if minded is None else _by_gradients
                menus |= _priced(stream, group, moments, minds, itemsizes[group.owner])
                del passed.moments[group.source]
        write_json(paths[passed.block], menus)

    done = {block for block, path in paths.items() if _are_prices_of(path, plan.within(block))}

    def forget(block: str) -> None:
        paths[block].unlink(missing_ok=True)

    stream_moments(stream, plan, batches, done, "price", finish, forget, work)
    return {name: menu for path in paths.values() for name, menu in read_json(path).items()}


def _are_prices_of(path: Path, groups: Sequence[Group]) -> bool:
    """Return whether a file holds the prices of these groups' menus, and not those of other forms."""
    if not path.is_file():
        return False
    menus = read_json(path)
    offered = {
        shape.owner: [form.as_json() for form in forms]
        for group in groups
        if group.menu
        for shape, forms in zip(group.shape.singles(), group.menu)
    }
    return all(menu.get("offered") == offered.get(name) for name, menu in menus.items())


def prices_in(work: Path) -> list[str]:
    """Names of the files of prices in a folder, which only a continuation needs."""
    return [path.name for path in work.glob("menu-*.json")]


Minds = Callable[[str, Tensor, Tensor, Moments], float]
"""Tells what a layer's rounded weight costs, given its name, both weights and its moments."""


def _by_block(passed: Passed) -> Minds:
    """The relative squared change of the block's output."""

    def minds(layer: str, weight: Tensor, rounded: Tensor, moments: Moments) -> float:
        return passed.probe.sensitivity([layer], [rounded.to(weight.dtype)])

    return minds


def _by_gradients(layer: str, weight: Tensor, rounded: Tensor, moments: Moments) -> float:
    """The rise of the loss, summed over the calibration data, to second order.

    `Σ (g · E x)² / 2` over tokens, with gradients and inputs taken as independent of each other
    (`emloc.linalg.row_weights`).
    """
    if moments.rows is None:
        return 0.0
    changed = squared_change(weight.float() - rounded, moments)
    return moments.rows.mean * changed / (2 * moments.tokens)


def _priced(
    stream: UnitStream, group: Group, moments: Moments, minds: Minds, itemsize: int
) -> Menus:
    weights = weights_of(stream, group)
    refuse_not_finite(moments.name, weights)
    menus: dict[str, Any] = {}
    parts = zip(group.shape.singles(), weights, group.menu)
    for number, (shape, weight, forms) in enumerate(parts):
        own = moments.for_layer(number)
        known = [f for f in forms if TOKENS_PER_RANK * rank_of(f) <= own.tokens]
        rounded, share, errors = price_forms(weight, own, known)
        minded = minds(shape.owner, weight, rounded, own)
        menus[shape.owner] = {
            "offered": [form.as_json() for form in forms],
            "forms": [form.as_json() for form in known],
            "bytes": [tensor_bytes(shape, form, itemsize) for form in known],
            "errors": errors,
            "dense_bytes": shape.numel * itemsize,
            "sensitivity": minded / share if minded > 0 and share > 1e-12 else None,
        }
    return menus


def price_forms(
    weight: Tensor, moments: Moments, forms: Sequence[Form]
) -> tuple[Tensor, float, list[float]]:
    """A weight rounded to 3 bits, its relative squared error, and those predicted of other forms.

    What a trellis loses is predicted from the spread of the weights alone. That is off by up to a factor of
    two, about the same at 2 to 4 bits of one layer and its root at 1: so the factor is taken from the 3 bits,
    whose error is known. So is what a residual takes away: inputs make the same directions expensive at all
    bits.

    Args:
        weight: d_out × d_in.
        moments: of the inputs.
    """
    feedback, matrix = Feedback.of(moments), moments.matrix
    whole = squared_output(weight, matrix)
    bits, group_size = REFERENCE
    if weight.shape[0] < least_steps(bits):
        bits = max(TRELLIS_BITS)
    rounded = trellis_values(weight, moments, bits, group_size)
    error = weight.float() - rounded
    lost = squared_output(error, matrix)
    rows, scale = _some_rows(weight, feedback.weights)
    guess = scale * trellis_error(rows, feedback.weights, bits, group_size)
    truth = lost / guess if guess > 0 else 1.0
    ranks = sorted({rank_of(form) for form in forms})
    left = dict(zip(ranks, left_by_rank(error, matrix, feedback.ridge, ranks)))
    del error

    @cache
    def along_trellis(bits: int, group_size: int) -> float:
        expected = scale * trellis_error(rows, feedback.weights, bits, group_size)
        return expected * truth ** (0.5 if bits == 1 else 1)

    def predicted(form: Form) -> float:
        bits, group_size = form.sizes["bits"], form.sizes["group_size"]
        if form.format is QUANTIZED:
            return scale * grid_error(rows, feedback.weights, bits, group_size)
        return along_trellis(bits, group_size) * left[rank_of(form)]

    errors = [lost, *map(predicted, forms)]
    shares = [error / whole if whole > 0 else 0.0 for error in errors]
    return rounded, shares[0], shares[1:]


def pricing_bytes(shape: GroupShape) -> int:
    """The most that `price_forms` holds beside weights and moments, of the largest layer."""
    # The error of a layer and what it is multiplied with, beside what following one form takes.
    rows = max(shape.d_out)
    return fitted_trellis_bytes(rows, shape.d_in) + 8 * rows * shape.d_in


def _said(form: Form) -> str:
    """A form in a line of all."""
    bits = f"at {form.sizes['bits']} bits"
    return f"{bits} and rank {rank_of(form)}" if rank_of(form) else bits


def rank_of(form: Form) -> int:
    """The rank of its residual; 0: it has none."""
    return form.sizes.get("residual_rank", 0)


def _some_rows(weight: Tensor, importance: Tensor) -> tuple[Tensor, float]:
    """Choose at most `PRICED_ROWS` rows that stand for all; and by how much more all lose than they do.

    Rows are rounded apart, and lose about in proportion to what they weigh: so they are taken evenly from
    the lightest to the heaviest.
    """
    if weight.shape[0] <= PRICED_ROWS:
        return weight, 1.0
    weighs = weight.float().square() @ importance.to(weight.device)
    places = torch.linspace(0, len(weighs) - 1, PRICED_ROWS, device=weight.device).round().long()
    chosen = torch.argsort(weighs, stable=True)[places].sort().values
    some, whole = (float(part.double().sum()) for part in (weighs[chosen], weighs))
    return weight[chosen], whole / some if some > 0 else 1.0


def with_chosen(
    plan: CompressionPlan, menus: Menus, shares: Mapping[str, float], of_loss: bool = False
) -> tuple[CompressionPlan, dict[str, float]]:
    """The plan with a form for every layer that has a menu, and what is predicted of it.

    Args:
        shares: the share of its dense bytes that each group's owner brings to the budget.
        of_loss: whether sensitivities are of the loss, and not of blocks' outputs.
    """
    owner_of = {layer: group.owner for group in plan.groups for layer in group.layers}
    budget = int(sum(shares[owner_of[n]] * menu["dense_bytes"] for n, menu in menus.items()))
    known = [menu["sensitivity"] for menu in menus.values() if menu["sensitivity"] is not None]
    # Of what was not shown nothing is known, so it counts as others do.
    typical = sum(known) / len(known) if known else 1.0
    options = {name: _options(menu, typical) for name, menu in menus.items()}
    places = allocate_bytes(options, budget)
    groups, dense, counts = list[Group](), dict(plan.kept_dense), dict[str, int]()
    for group in plan.groups:
        if not group.menu:
            groups.append(group)
            continue
        for shape, offered in zip(group.shape.singles(), group.menu):
            known = [form.as_json() for form in offered]
            priced = menus[shape.owner]["forms"] if shape.owner in places else known
            forms = [offered[known.index(form)] for form in priced]
            place = places.get(shape.owner, 0)  # what no token reached stays dense all the same
            form = None if place == len(forms) else forms[place]
            if form is None:
                dense[shape.owner] = DENSE
            else:
                groups.append(Group(shape, form, reads_with=group.owner))
            if shape.owner in places:
                kind = "dense" if form is None else _said(form)
                counts[kind] = counts.get(kind, 0) + 1
    chosen = [options[name][place] for name, place in places.items()]
    error = sum(option.error for option in chosen) ** (1 if of_loss else 0.5)
    weights = sum(s.numel for g in plan.groups for s in g.shape.singles() if s.owner in places)
    bits = 8 * sum(option.bytes for option in chosen) / max(1, weights)
    said = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    what = "rise in loss on the calibration data" if of_loss else "error of the hidden state"
    console.print(
        f"compress: layers: {said}; {bits:.2f} bits per weight; predicted {what} {error:.4f}"
    )
    made = CompressionPlan(tuple(groups), dense, plan.tables)
    return made, {"chosen": error, "bits_per_weight": bits}


def _options(menu: Mapping[str, Any], typical: float) -> list[Option]:
    """The forms of a layer's menu, the dense weight last.

    Args:
        typical: the sensitivity of a layer whose own is not known.
    """
    unit = typical if menu["sensitivity"] is None else menu["sensitivity"]
    made = [Option(size, unit * error) for size, error in zip(menu["bytes"], menu["errors"])]
    return [*made, Option(menu["dense_bytes"], 0.0)]
