"""Write base + adapter as a full checkpoint, tensor by tensor, in the base's own shards and dtypes.

An adapter whose manifest says that it runs on dequantised weights is merged into those.
"""

import re
from collections.abc import Collection, Container
from pathlib import Path

import torch

from emloc.adapters.adapted_weights import adapted_weights
from emloc.adapters.belonging import refuse_uncorrected, require_original
from emloc.adapters.merged_tensors import MergedModel, merged_model, merged_part
from emloc.adapters.rounding import DEQUANTISED, RoundedBase, Rounding
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_base import require_base
from emloc.artefacts.companions import say_other_template
from emloc.artefacts.file_digest import file_sha256
from emloc.artefacts.intact import require_read
from emloc.artefacts.json_files import read_json
from emloc.artefacts.kinds import ADAPTER, CORRECTED_ADAPTER, MERGED_MODEL
from emloc.artefacts.manifest import Manifest, ModelReference
from emloc.artefacts.output_place import has_place
from emloc.artefacts.shard_writer import ShardWriter
from emloc.artefacts.small_files import copy_file, write_json
from emloc.config import MergeConfig
from emloc.extend.opening import named_family, open_model
from emloc.machine.progress import console, progress_bar
from emloc.planning.setting import Setting
from emloc.stages.frame import Artefact, Written
from emloc.stages.stage import stage


@stage(
    MergeConfig,
    check=has_place,
    consumes={"adapter": (CORRECTED_ADAPTER, ADAPTER)},
    produces=MERGED_MODEL,
    folder="merged",
    memory=Setting.merge,
)
def merge(config: MergeConfig) -> Path:
    """Merge an adapter into its base model; returns the merged model's folder."""
    adapter = Adapter.open(config.adapter)
    origin = require_read(adapter.path, fresh=True)
    refuse_uncorrected(adapter, origin)
    _say_other_weights(adapter, origin)
    origin_config = origin.base_model.single_file_config if origin else None
    base, family = open_model(
        config.model_name_or_path or require_base(adapter, origin, "merge"),
        config.single_file_config or origin_config,
        config.family,
        origin.family if origin else None,
    )
    adapter = adapter.with_parts(base.parts)
    digest = base.digest()
    require_original(adapter, origin, base, digest, "merge into")
    model = family.skeleton(base, torch.float32)
    adapted = adapted_weights(adapter, family, model, base)
    adapter = adapted.adapter
    say_other_template(adapter.path, base.path)
    rounding = Rounding.runs_on(origin)
    frozen = None if rounding is None else RoundedBase.of(rounding, family, model, base)
    merged = merged_model(adapted, family, model, base, frozen)
    parts = {name: merged_part(part, base.part(name)) for name, part in adapter.parts.items()}
    adapter_digest = adapter.digest()
    settings = {
        **named_family(base, family),
        "base_digest": digest,
        "companions_digest": base.companions_digest(),
        "adapter_digest": adapter_digest,
        **({} if rounding is None else {DEQUANTISED: rounding.as_json()}),
    }
    artefact = Artefact(
        "merge",
        MERGED_MODEL,
        config.output_dir,
        settings,
        family.name,
        ModelReference.of(base, digest),
        adapter=ModelReference.of_adapter(adapter.path, adapter_digest),
        packages=("torch", "safetensors"),
        memory=config.memory,
    )

    def write(work: Path) -> Written:
        files = _write_shards(merged, work)
        for name, part in parts.items():
            written = _write_shards(part, work / name)
            files |= {f"{name}/{file}": digest for file, digest in written.items()}
        _write_beside(merged, work, files.keys(), adapter.parts)
        count = sum(len(each.layers) for each in (adapter, *adapter.parts.values()))
        return Written(files, summary={"merged_layers": count})

    return artefact.write(write, lambda: merge.contract(config, base, family, adapter))


def _say_other_weights(adapter: Adapter, origin: Manifest | None) -> None:
    """Say that a LoRA learnt beside blocks in few bits, which the base that it goes into has not."""
    bits = None if origin is None else origin.settings.get("stream_bits")
    if bits is not None:
        console.print(
            f"merge: {adapter.path} was trained beside blocks in {bits} bits (stream_bits), and goes into "
            f"the base as it is stored; a few steps of emloc polish would close the difference."
        )


_WEIGHTS = re.compile(r".*\.safetensors(\.index\.[^.]+\.json)?")
"""Weights, and the index of a variant of them, such as `model.safetensors.index.fp16.json`."""


def _write_beside(
    merged: MergedModel, work: Path, written: Collection[str], parts: Container[str]
) -> None:
    """Config, index and tokenizer; of a base in another layout, those of the layout written.

    Args:
        written: files that hold merged weights.
        parts: models of a pipeline that were merged, of which no other weights, such as a variant in half
            precision, may stay: they are without the LoRA.
    """
    base, layout = merged.base, merged.base.layout
    for name in base.companions():
        folder, _, file = name.partition("/")
        if name not in written and not (folder in parts and _WEIGHTS.fullmatch(file)):
            copy_file(base.path / name, work / name)
    config = base.config if merged.config is None else merged.config
    if read_json(base.path / layout.config) == config:
        copy_file(base.path / layout.config, work / layout.config)
    else:
        write_json(work / layout.config, config)
    # Written anew: the base's folder may hold the index of other files than those that were read.
    tensors = merged.tensors
    if {info.file for info in tensors.values()} != {layout.single}:
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in tensors.values())},
            "weight_map": {name: layout.inside(info.file) for name, info in tensors.items()},
        }
        write_json(work / layout.index, index)


def _write_shards(merged: MergedModel, work: Path) -> dict[str, str]:
    base, tensors = merged.base, merged.tensors
    by_file: dict[str, list[str]] = {}
    for name, info in tensors.items():
        by_file.setdefault(info.file, []).append(name)
    source = f"{base.name} with {merged.adapter.path}"
    digests: dict[str, str] = {}
    with progress_bar("merge", len(tensors)) as advance:
        for file, names in by_file.items():
            # A shard that an interrupted run finished is whole: it was renamed when complete.
            if (work / file).is_file():
                digests[file] = file_sha256(work / file)
                advance(len(names))
                continue
            declared = {name: (tensors[name].dtype, tensors[name].shape) for name in names}
            with ShardWriter(work / file, declared, source) as shard:
                for name, following in zip(names, [*names[1:], None]):
                    if following in base.tensors:
                        base.prefetch([following])
                    shard.write(name, merged.make(name))
                    advance(note=name)
            digests[file] = shard.sha256
    return digests
