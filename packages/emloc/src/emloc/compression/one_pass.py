"""The pass over the base model: fold moments while micro-batches run, fit at each block.

All micro-batches advance in lockstep. At a block its weights are loaded, hooks fold the moments of
every group's side, and when all are through, each group is fitted in its form and the block is written.
Peak memory is one block in float32, its moments and what fitting one group takes, and the hidden states.

Where sizes are to be allocated (`emloc.linalg.allocation`), groups are fitted in the largest that they may
get, and it is measured how much the block's output minds their errors. Where forms are to be chosen
(`emloc.compression.menu_choice`), layers are fitted in all of their menu.

A block that is finished already is only run, not fitted again: an interrupted run gives the same
bytes as an uninterrupted one.
"""

import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from emloc.compression.emulator_folder import MENU, SPECTRUM, EmulatorFolder
from emloc.compression.groups import CompressionPlan, Group
from emloc.compression.menu_choice import candidate_name, fit_menu, write_candidates
from emloc.compression.sensitivity import BlockProbe
from emloc.compression.truncation import uniform_weights
from emloc.errors import ConfigError
from emloc.extend.capabilities import token_mask_of
from emloc.extend.family import Batch
from emloc.extend.losses import LossSum, loss_sum
from emloc.formats.abilities import Cuttable
from emloc.formats.layer_format import Tensors
from emloc.linalg.gram import Moments
from emloc.machine.progress import progress_bar
from emloc.streaming.input_rows import input_rows
from emloc.streaming.lockstep import Call, current_call, lockstep, refuse_again
from emloc.streaming.real_rows import is_expert, real_rows
from emloc.streaming.stream import UnitStream

SMALL = 0.25
"""A share of the largest block. A module behind the last block that is smaller is run, to see whether
blocks come again, as in models that loop; a head is larger, and too dear to run for that.
"""


def compress_blocks(stream: UnitStream, folder: EmulatorFolder, batches: Sequence[Batch]) -> None:
    """Run the micro-batches through the base once and write every block's shard into `folder`.

    Raises:
        NumericalError: a weight or an activation is NaN; names the layer.
        ConfigError: a block runs more than once in a forward, layers share a weight, or it is not known
            which of the rows that a layer reads are padding.
    """
    _refuse_shared(stream, folder.plan)
    blocks, done, seen = stream.blocks, folder.finished_blocks(), set[str]()
    if done >= set(blocks):
        return
    calls = [_call(stream, batch) for batch in batches]
    probe = BlockProbe(stream)
    probed = [
        block
        for block in blocks
        if any(group.wide or group.menu for group in folder.plan.within(block))
    ]
    small = SMALL * max(_numel(stream, block) for block in blocks)
    with progress_bar("compress", len(blocks)) as advance:

        @contextmanager
        def visit(unit: str) -> Iterator[None]:
            if unit in blocks:
                refuse_again(unit, seen)
                seen.add(unit)
            with stream.filled(unit):
                if unit in blocks and unit not in done:
                    with probe.of(unit):
                        yield from _compress_block(stream, folder, unit, probe)
                else:
                    yield
            if unit in blocks:
                advance(note=unit)

        def enough(waiting: Set[str | None]) -> bool:
            """Once all blocks are through, and none of them comes again as far as can be seen cheaply."""
            if not seen.issuperset(blocks) or not waiting.isdisjoint(blocks):
                return False
            return len(waiting) > 1 or any(_numel(stream, str(unit)) > small for unit in waiting)

        with probe.watching(probed):
            lockstep(stream.model, stream.units, calls, visit, enough, stream.device)
        for block in blocks:
            if block not in seen | done:  # a tower that no sample needs
                _write(folder, block, {}, {}, _report({}, _layers_of(folder, block), 0.0))
                advance(note=block)


def _numel(stream: UnitStream, unit: str) -> int:
    return sum(p.numel() for p in stream.model.get_submodule(unit).parameters())


def _layers_of(folder: EmulatorFolder, block: str) -> list[str]:
    return [name for group in folder.plan.within(block) for name in group.layers]


def _report(layers: dict[str, Any], unreached: list[str], seconds: float) -> dict[str, Any]:
    return {"layers": layers, "unreached": unreached, "seconds": round(seconds, 3)}


def _refuse_shared(stream: UnitStream, plan: CompressionPlan) -> None:
    """A weight that several layers have in common reads more than one of them shows."""
    names: dict[int, list[str]] = {}
    for name, module in stream.model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    holders: dict[str, str] = {}
    for layer in (layer for group in plan.groups for layer in group.layers):
        same_module = names[id(stream.model.get_submodule(layer))]
        other = holders.setdefault(stream.weight_name(layer), layer)
        if len(same_module) > 1 or other != layer:
            others = [name for name in (*same_module, other) if name != layer]
            raise ConfigError(
                f"Layers {layer} and {others[0]} share one weight, which cannot be compressed for one of "
                f"them; exclude both."
            )


def _call(stream: UnitStream, batch: Batch) -> Call:
    def run() -> LossSum:
        call = current_call()
        assert call is not None
        call.context = {name: tensor.to(stream.device) for name, tensor in batch.items()}
        return loss_sum(stream.family, stream.model, call.context)

    return Call(run)


def _compress_block(
    stream: UnitStream, folder: EmulatorFolder, block: str, probe: BlockProbe
) -> Iterator[None]:
    """Fold moments while the caller runs the micro-batches, then fit and write."""
    started = time.monotonic()
    groups = folder.plan.within(block)
    moments = {
        group.owner: Moments(group.form.format.side(group.shape), group.owner) for group in groups
    }
    handles = [
        stream.model.get_submodule(group.owner).register_forward_hook(
            _folding(stream, block, group, moments[group.owner])
        )
        for group in groups
    ]
    handles += [handle for group in groups for handle in _watch_shared_input(stream, group)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    fitted: dict[str, Tensors] = {}
    candidates: dict[str, Tensor] = {}
    menus: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    unreached: list[str] = []
    for group in groups:
        folded = moments.pop(group.owner)
        if folded.tokens == 0:  # an expert that no token chose, or a layer that the forward skips
            unreached += group.layers
        elif group.menu:
            weights, itemsize = _weights(stream, group), folder.itemsize(group.owner)
            made, menu = fit_menu(group, weights, folded, probe, itemsize)
            candidates.update(made)
            menus.update(menu)
        else:
            fitted[group.owner], layers[group.owner] = _fit(stream, group, folded, probe)
    report = _report(layers, unreached, time.monotonic() - started)
    _write(folder, block, fitted, candidates, {**report, **({MENU: menus} if menus else {})})


def _write(
    folder: EmulatorFolder,
    block: str,
    fitted: Mapping[str, Tensors],
    candidates: dict[str, Tensor],
    report: Mapping[str, Any],
) -> None:
    """The block's shard; or, where forms are to be chosen, all that its shard may hold."""
    if not any(group.menu for group in folder.plan.groups):
        folder.write_block(block, fitted, report)
        return
    for tensors in fitted.values():
        candidates.update({candidate_name(layer, 0, n): t for (layer, n), t in tensors.items()})
    write_candidates(folder, block, candidates, {MENU: {}, **report})


def _watch_shared_input(stream: UnitStream, group: Group) -> list[Any]:
    """Layers were found to read the same tensor in one forward; they must in these.

    They are called in any order; a round begins with a layer that the last one had already.
    """
    read: dict[str, Tensor] = {}

    def watching(name: str) -> Any:
        def check(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if name in read:
                read.clear()
            other = next(iter(read), None)
            if other and read[other] is not x and not torch.equal(read[other], x):
                raise ConfigError(
                    f"Layers {other} and {name} do not always read the same, so they cannot share a "
                    f"factor; pass share_factors=false."
                )
            read[name] = x
            if len(read) == len(group.layers):
                read.clear()  # so that nothing is held for longer than it is

        return check

    watched = group.layers if len(group.layers) > 1 else ()
    return [
        stream.model.get_submodule(name).register_forward_pre_hook(watching(name))
        for name in watched
    ]


def _folding(stream: UnitStream, block: str, group: Group, moments: Moments) -> Any:
    expert = is_expert(stream.model, block, group.owner)
    convolution = bool(group.shape.kernel)

    def fold(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        call = current_call()
        batch: Batch = {} if call is None else call.context
        mask = token_mask_of(stream.family, batch, group.owner)
        if expert and inputs[0].ndim == 2:  # tokens in an order and number of its own
            mask = None

        def real(values: Tensor) -> Tensor:
            return real_rows(values, mask, f"Layer {group.owner}")

        if moments.side == "input":
            for rows in input_rows(module, inputs[0], output, mask, f"Layer {group.owner}"):
                moments.fold(rows)
        elif len(group.layers) == 1:
            y = real(output.movedim(-3, -1) if convolution else output)
            bias = dict(module.named_parameters()).get("bias")
            moments.fold(y if bias is None else y - bias)
        else:
            x = real(inputs[0])
            moments.fold(torch.cat([x @ weight.T for weight in _weights(stream, group)], dim=1))

    return fold


def _weights(stream: UnitStream, group: Group) -> list[Tensor]:
    return [stream.weight(name) for name in group.layers]


def _fit(
    stream: UnitStream, group: Group, moments: Moments, probe: BlockProbe
) -> tuple[Tensors, dict[str, Any]]:
    shape, form = group.shape, group.fitted
    fitted = form.format.fit(_weights(stream, group), moments, shape, form)
    report: dict[str, Any] = {
        "layers": list(shape.layers),
        **form.as_json(),
        "d_out": list(shape.d_out),
        "d_in": shape.d_in,
        "side": moments.side,
        "tokens": moments.tokens,
        **fitted.report,
    }
    if group.wide is not None:
        assert isinstance(form.format, Cuttable)
        assert fitted.spectrum is not None
        unit = form.format.unit
        report[f"uniform_{unit}"] = group.form.sizes[unit]
        report["sensitivity"] = probe.sensitivity(
            shape.layers, uniform_weights(group, fitted.tensors)
        )
        report[SPECTRUM] = {"values": fitted.spectrum.values, "total": fitted.spectrum.total}
    return fitted.tensors, report
