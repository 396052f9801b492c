"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the base in NF4, double quantisation, LoRA beside it.

The light model is an ordinary 4-bit checkpoint of bitsandbytes and transformers or diffusers; training
prepares that of transformers with PEFT's `prepare_model_for_kbit_training`. The adapter is then put on the
original weights, as people do, and not on the quantised ones that it was trained beside. The light model's
size is what four bits make it, whatever `keep_ratio` says.

All linear layers are quantised but the output head. What bitsandbytes has no layer for, such as convolutions,
stays as it is. Products are computed in the checkpoint's dtype.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from emloc.config import StageConfig
from emloc.extend.capabilities import layers_in_few_bits
from emloc.extend.family import ModelFamily
from emloc.extend.methods import NoOptions, Task
from emloc.machine.progress import warn
from emloc.methods.light import train_light
from emloc_baselines.light import LightModel, Piece, Source, build_light
from emloc_baselines.nf4 import BLOCK, quantised_pieces, rows_are_decoded
from emloc_baselines.recovery import recover_adapter

NAME = "qlora"


class Qlora:
    """`Method`."""

    options: type[StageConfig] = NoOptions

    def build(self, task: Task, out: Path) -> Path:
        """See `Method`; quantises tensor by tensor."""
        return build_light(NAME, task, out, NoOptions(), quantised, calibrated=False)

    def train(self, task: Task, light: Path | None, out: Path) -> Path:
        """See `Method`."""
        return train_light(task, light, out)

    def recover(self, task: Task, light: Path | None, adapter: Path, out: Path) -> Path:
        """See `Method`; the layers are the same ones."""
        assert light is not None
        return recover_adapter(adapter, light, out)


def quantised(source: Source) -> LightModel:
    """Every linear layer but the head in NF4; convolutions stay as they are."""
    base = source.base
    dtype = next(i.dtype for i in base.tensors.values() if i.dtype.is_floating_point)
    model = cast(Any, source.family.skeleton(base, torch.float32))
    pieces: dict[str, Sequence[Piece]] = {}
    kept: list[str] = []
    odd: list[str] = []
    linear, head = _linear_layers(source.family, model)
    for name in linear:
        stored = source.family.stored(model, f"{name}.weight", base)
        tensor = None if stored is None else stored.plain_name
        if name in head or stored is None or tensor is None:
            kept.append(name)
            continue

        def read(place: Any = stored) -> Tensor:
            return place.layer_weight(base.read).contiguous()

        pieces[tensor] = quantised_pieces(tensor, read)
        if model.get_submodule(name).weight.shape[-1] % BLOCK:
            odd.append(name)
    if odd and not rows_are_decoded():
        warn(
            f"qlora: on this processor, bitsandbytes wrongly decodes rows that are not whole blocks of "
            f"{BLOCK} weights, such as those of {odd[0]}; what is trained on the CPU is not QLoRA"
        )
    return LightModel(_config(base.config, dtype, kept), pieces)


def _linear_layers(family: ModelFamily, model: Any) -> tuple[Sequence[str], Sequence[str]]:
    """The layers that the family's library would quantise, and those of them that are of the head."""
    if not isinstance(model, PreTrainedModel):
        return layers_in_few_bits(family, model, None), ()
    # These two classes and no others that derive from them.
    names = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    }
    head: Any = model.get_output_embeddings()
    if head is not None:
        return list(names), [name for name, module in names.items() if module is head]
    # Of a model without one, transformers leaves the module that comes last, such as a classifier.
    last = list(dict(model.named_children()))[-1]
    return list(names), [name for name in names if name == last or name.startswith(f"{last}.")]


def _config(config: Mapping[str, Any], dtype: torch.dtype, kept: Sequence[str]) -> dict[str, Any]:
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(kept),
    }
    return {**config, "quantization_config": quantization}
