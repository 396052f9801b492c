"""Fit every group in its form, in one pass over the base model, and write the shards block by block.

Where sizes are to be allocated (`emloc.linalg.allocation`), groups are fitted in the largest that they may
get, and it is measured how much the block's output minds their errors.

A block that is finished already is only run, not fitted again: an interrupted run gives the same bytes as an
uninterrupted one.
"""

import time
from collections.abc import Sequence
from typing import Any

from emloc.compression.emulator_folder import SPECTRUM, EmulatorFolder
from emloc.compression.groups import Group
from emloc.compression.one_pass import Passed, stream_moments, weights_of
from emloc.compression.sensitivity import BlockProbe
from emloc.compression.truncation import uniform_weights
from emloc.extend.family import Batch
from emloc.formats.abilities import Cuttable
from emloc.formats.layer_format import Tensors
from emloc.linalg.gram import Moments
from emloc.streaming.stream import UnitStream


def compress_blocks(
    stream: UnitStream,
    folder: EmulatorFolder,
    batches: Sequence[Batch],
    propagate_errors: bool = False,
) -> None:
    """Run the micro-batches through the base once and write every block's shard into `folder`.

    Args:
        propagate_errors: whether a block is fitted on what it reads in the emulator, not in the base.

    Raises:
        NumericalError: a weight or an activation is NaN; names the layer.
        ConfigError: see `stream_moments`.
    """

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
            fitted[group.owner], layers[group.owner] = _fit(stream, group, moments, passed.probe)
            if last[group.source] == group.owner:
                del passed.moments[group.source]
        seconds = round(time.monotonic() - passed.started, 3)
        report = {"layers": layers, "unreached": unreached, "seconds": seconds if layers else 0.0}
        folder.write_block(passed.block, fitted, report)

    done = folder.finished_blocks()
    emulated = folder.emulated if propagate_errors else None
    stream_moments(stream, folder.plan, batches, done, "compress", finish, emulated)


def _fit(
    stream: UnitStream, group: Group, moments: Moments, probe: BlockProbe
) -> tuple[Tensors, dict[str, Any]]:
    shape, form = group.shape, group.fitted
    fitted = form.format.fit(weights_of(stream, group), moments, shape, form)
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
