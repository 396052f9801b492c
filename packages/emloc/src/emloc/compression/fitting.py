"""Fit every group in its form, in one pass over the base model, and write the shards block by block.

Where sizes are to be allocated (`emloc.linalg.allocation`), groups are fitted in the largest that they may
get, and it is measured how much the block's output minds their errors.

A block that is finished already is only run, not fitted again: an interrupted run gives the same bytes as an
uninterrupted one.
"""

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from emloc.compression.emulator_folder import SPECTRUM, EmulatorFolder
from emloc.compression.groups import Group
from emloc.compression.one_pass import Passed, stream_moments, weights_of
from emloc.compression.output_gradients import OutputGradients
from emloc.compression.propagation import compress_propagating
from emloc.compression.truncation import uniform_weights
from emloc.extend.family import Batch
from emloc.formats.abilities import Cuttable, WeighsRows
from emloc.formats.layer_format import Tensors
from emloc.linalg.gram import Moments
from emloc.streaming.stream import UnitStream


def compress_blocks(
    stream: UnitStream,
    folder: EmulatorFolder,
    batches: Sequence[Batch],
    propagate_errors: bool = False,
    minded: OutputGradients | None = None,
) -> None:
    """Run the micro-batches through the base once and write every block's shard into `folder`.

    Args:
        propagate_errors: whether a layer is fitted to give on what it reads in the emulator what it gives in
            the base (`emloc.compression.propagation`); else, on what it reads in the base.
        minded: by which errors of outputs are weighed; None: all alike.

    Raises:
        NumericalError: a weight or an activation is NaN; names the layer.
        ConfigError: see `stream_moments`.
    """
    if propagate_errors:
        compress_propagating(stream, folder, batches, fit_group)
        return

    def finish(passed: Passed) -> None:
        fitted: dict[str, Tensors] = {}
        layers: dict[str, Any] = {}
        unreached: list[str] = []
        groups = folder.plan.within(passed.block)
        last = {group.source: group.owner for group in groups}
        for group in groups:
            moments = passed.moments.get(group.source)
            if moments is None or moments.tokens == 0:
                unreached += group.layers
                continue
            heeds = isinstance(group.form.format, WeighsRows)
            moments.rows = minded.of(group) if minded is not None and heeds else None
            tensors, entry = fit_group(group, weights_of(stream, group), moments)
            if group.wide is not None:
                entry["sensitivity"] = passed.probe.sensitivity(
                    group.layers, uniform_weights(group, tensors)
                )
            fitted[group.owner], layers[group.owner] = tensors, entry
            if last[group.source] == group.owner:
                del passed.moments[group.source]
        seconds = round(time.monotonic() - passed.started, 3)
        report = {"layers": layers, "unreached": unreached, "seconds": seconds if layers else 0.0}
        folder.write_block(passed.block, fitted, report)

    done = folder.finished_blocks()
    stream_moments(
        stream, folder.plan, batches, done, "compress", finish, folder.forget_block, folder.work
    )


def fit_group(
    group: Group, weights: Sequence[Tensor], moments: Moments
) -> tuple[Tensors, dict[str, Any]]:
    """The stored tensors of a group in its form, and its entry in the block's report.

    Args:
        weights: of its layers, d_out × d_in each.

    Raises:
        NumericalError: a weight is NaN; names the layer.
    """
    shape, form = group.shape, group.fitted
    fitted = form.format.fit(weights, moments, shape, form)
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
        report[SPECTRUM] = {"values": fitted.spectrum.values, "total": fitted.spectrum.total}
    return fitted.tensors, report
