"""LoRAs that begin as EVA does (Paischer et al. 2024, arXiv 2410.07170), on models of any family.

PEFT searches the directions in which the inputs of each layer vary most and hands ranks to the layers where
they vary more. It is told here which rows of an input count: those that the family calls real, and of a
causal language model those with a label among them, as PEFT has it.
"""

from collections.abc import Container, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from peft import LoraConfig, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from emloc.errors import ConfigError
from emloc.extend.family import Batch, ModelFamily
from emloc.streaming.real_rows import input_mask, may_be_expert, real_rows, same_order

RHO = 2.0
"""PEFT's own bound of the rank that a layer may get, over the rank that was asked for."""

MOST_PASSES = 100
"""Passes over the samples after which directions that still turn are given up."""

PREFIX = "base_model.model."

OTHERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
"""Layers that PEFT puts a LoRA on and EVA does not begin."""


def refuse_other_layers(model: nn.Module, lora: LoraConfig) -> None:
    """Refuse a LoRA on what EVA cannot begin.

    Raises:
        ConfigError: it would be on a convolution or an embedding too.
    """
    for name, module in model.named_modules():
        if isinstance(module, OTHERS) and check_target_module_exists(lora, name):
            raise ConfigError(
                f"train: lora_init=eva works on linear layers, but {name} is a {type(module).__name__}; "
                f"leave it out of lora_target_modules, or pass another lora_init."
            )


def begin_with_eva(
    model: Any,
    family: ModelFamily,
    blocks: Sequence[str],
    batches: Sequence[Batch],
    task_type: str | None,
) -> None:
    """Initialise the LoRA of a PEFT model, made with `init_lora_weights="eva"`, from what layers read.

    Args:
        blocks: names of the model's blocks, without PEFT's prefix.
        batches: on the model's device, each as the family's `loss` takes it.
        task_type: PEFT's name of what the model is for; `CAUSAL_LM` has labels in the shape of its tokens.

    Raises:
        ConfigError: a layer has more ranks than it reads numbers, reads nothing, or rows of which it is not
            known which are padding; directions do not settle.
    """
    rho = _reach(model)
    model.peft_config["default"].eva_config.rho = rho
    adapted = _adapted(model)
    # PEFT looks for as many directions in all layers that read the same as in the one of the highest rank.
    needed = max(round(rank * rho) for rank, _ in adapted.values())
    listed = {
        name
        for name in adapted
        for block in blocks
        if (layer := name.removeprefix(PREFIX)).startswith(f"{block}.")
        and may_be_expert(model.get_base_model(), block, layer)
    }
    causal, most = task_type == "CAUSAL_LM", MOST_PASSES * len(batches)
    reader = _Reader(family, list(adapted), needed, listed, causal, most)
    with redirect_stdout(StringIO()):  # PEFT says of every layer when it has too few rows as yet
        initialize_lora_eva_weights(
            model,
            batches,
            forward_fn=reader.run,
            prepare_model_inputs_fn=_whole,
            prepare_layer_inputs_fn=reader.rows,
            show_progress_bar=False,
        )


def _whole(batch: Batch, _: object) -> Batch:
    return batch


def _reach(model: Any) -> float:
    """The most that a layer's rank may grow by: PEFT's own bound, or less where a layer is narrow."""
    reach = RHO
    for name, (rank, width) in _adapted(model).items():
        if rank > width:
            raise ConfigError(
                f"train: lora_init=eva cannot find {rank} directions in the {width} numbers that "
                f"{name.removeprefix(PREFIX)} reads; lower lora_r, or leave it out of lora_target_modules."
            )
        reach = min(reach, width / rank)
    return reach


def _adapted(model: Any) -> dict[str, tuple[int, int]]:
    """Rank, and how many numbers it reads, of every layer with a LoRA."""
    adapted: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            adapted[name] = layer.r["default"], layer.lora_A["default"].weight.shape[1]
    return adapted


class _Reader:
    """The forwards of a search, and the rows that they show each layer.

    Rows that are fewer than a layer's directions, such as those of a head that reads one for each sample,
    are put together over batches: PEFT would wait for a batch with enough of them for ever.

    Args:
        layers: names of those with a LoRA, in PEFT's own form.
        needed: rows that PEFT needs of a layer at once.
        listed: layers that may be experts.
        causal: whether labels are of tokens.
        most: forwards after which the search is given up.
    """

    def __init__(
        self,
        family: ModelFamily,
        layers: Sequence[str],
        needed: int,
        listed: Container[str],
        causal: bool,
        most: int,
    ) -> None:
        self._family, self._layers, self._listed = family, layers, listed
        self._needed, self._causal, self._most, self._runs = needed, causal, most, 0
        self._waiting: dict[str, Tensor] = {}
        self._unread = set(layers)

    def run(self, model: Any, batch: Batch) -> None:
        """One forward; of the first one every layer has to have read something."""
        self._family.loss(model, batch)
        self._runs += 1
        if self._unread:
            first = next(name for name in self._layers if name in self._unread)
            raise ConfigError(
                f"train: lora_init=eva looks at what layers read, but {len(self._unread)} of them, the "
                f"first {first.removeprefix(PREFIX)}, read nothing of the first samples; leave them out of "
                f"lora_target_modules, or pass another lora_init."
            )
        if self._runs > self._most:
            raise ConfigError(
                f"train: lora_init=eva found no directions that settle in {MOST_PASSES} passes over the "
                f"first samples; pass a larger per_device_train_batch_size, or another lora_init."
            )

    def rows(self, given: Any, batch: Batch, name: str) -> Tensor:
        """The rows (rows × d_in) that count of what a layer read."""
        self._unread.discard(name)
        values: Tensor = given[0] if isinstance(given, (tuple, list)) else given
        rows = self._counted(values, batch, name).contiguous()
        if len(rows) >= self._needed:
            return rows
        together = torch.cat([self._waiting.pop(name, rows[:0]), rows])
        if len(together) < self._needed:
            self._waiting[name] = together
        return together

    def _counted(self, values: Tensor, batch: Batch, name: str) -> Tensor:
        layer = name.removeprefix(PREFIX)
        mask = input_mask(self._family, batch, layer, values, name in self._listed)
        if mask is not None and values.shape[:-1] == mask.shape[:1]:
            mask = None  # a row for each sample
        if mask is not None and not same_order(tuple(values.shape[:-1]), tuple(mask.shape)):
            raise ConfigError(
                f"train: lora_init=eva does not know which rows of what {layer} reads are padding "
                f"({tuple(values.shape[:-1])} for {tuple(mask.shape)} tokens); leave it out of "
                f"lora_target_modules, or pass another lora_init."
            )
        labels = batch.get("labels") if self._causal else None
        if labels is not None and labels.shape == values.shape[:-1]:
            learnt = labels != -100
            mask = learnt if mask is None else mask.reshape(learnt.shape).to(learnt.device) & learnt
        return real_rows(values, mask, layer)
