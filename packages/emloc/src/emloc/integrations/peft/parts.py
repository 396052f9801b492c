"""LoRAs on further models of a pipeline, trained along with the one on the main model.

To the trainer they are one model, of which it saves and resumes what is trained: optimiser, clipping of
gradients and checkpoints see all parameters together, and each model is called by itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from emloc.artefacts.adapter import Adapter
from emloc.config import TrainConfig
from emloc.errors import ConfigError
from emloc.integrations.peft.attach import put_on


@dataclass(frozen=True)
class Part:
    """A model to train along.

    Attributes:
        model: loaded; gets a LoRA in place.
        targets: the ends of the names of the layers to adapt.
    """

    model: Any
    targets: Sequence[str]


class TrainedTogether(nn.Module):
    """A main model with its LoRA, and parts with theirs; called, it is the main model.

    Its state are the parameters that are trained: what a checkpoint of the trainer keeps.
    """

    def __init__(self, main: Any, parts: Mapping[str, Any]) -> None:
        super().__init__()
        self.main, self.parts = main, nn.ModuleDict(parts)
        # Of a main model whose blocks come and go, libraries ask the whole before they move it.
        placed: Any = getattr(main.get_base_model(), "hf_device_map", None)
        if placed is not None:
            self.hf_device_map = placed

    @property
    def config(self) -> Any:
        """The main model's."""
        return self.main.config

    def get_base_model(self) -> Any:
        """The main model without PEFT's wrapper."""
        return self.main.get_base_model()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the main model's forward."""
        return self.main(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The trained parameters."""
        return {n: p.detach() for n, p in self.named_parameters() if p.requires_grad}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """All of the trained parameters; the others stay.

        Raises:
            RuntimeError: some are missing, or there are others.
        """
        frozen = {n: p for n, p in super().state_dict().items() if n not in self.state_dict()}
        return super().load_state_dict({**frozen, **state_dict}, strict=True)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """PEFT adapters: the main model's in `folder`, each part's in a subfolder of its name."""
        self.main.save_pretrained(str(folder), **options)
        for name, part in self.parts.items():
            part.save_pretrained(str(Path(folder) / name), **options)  # pyright: ignore


def with_parts(
    main: Any, parts: Mapping[str, Part], config: TrainConfig, adapter: Adapter | None = None
) -> Any:
    """The main model and the parts as one, with LoRAs on the parts by the same options.

    Patterns, modules to save and blocks are named in terms of the main model, and stay its own.

    Args:
        adapter: to go on from, with the LoRAs of the parts.

    Raises:
        ConfigError: a beginning that looks at the main model's weights or data; or the adapter to go on from
            has LoRAs on other parts than are to be trained.
    """
    _require_same_parts(parts, adapter)
    if not parts:
        return main
    if adapter is not None:
        goes_on = {
            name: put_on(part.model.requires_grad_(False), adapter.parts[name], trained=True)
            for name, part in parts.items()
        }
        return TrainedTogether(main, goes_on)
    made: dict[str, Any] = {}
    for name, part in parts.items():
        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType] (PEFT takes both)
            lora_dropout=config.lora_dropout,
            target_modules=list(part.targets),
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            init_lora_weights="gaussian" if config.lora_init == "gaussian" else True,
        )
        made[name] = get_peft_model(part.model.requires_grad_(False), lora)
    return TrainedTogether(main, made)


def refuse_beginning(config: TrainConfig, parts: Mapping[str, Part]) -> None:
    """Refuse a beginning that only a main model can have, where there are others.

    Raises:
        ConfigError: with what to leave out.
    """
    if parts and config.lora_init not in ("default", "gaussian"):
        raise ConfigError(
            f"train: lora_init={config.lora_init} applies to the main model; leave it out when "
            f"{' and '.join(parts)} are also trained."
        )


def _require_same_parts(parts: Mapping[str, Part], adapter: Adapter | None) -> None:
    if adapter is None or adapter.parts.keys() == parts.keys():
        return
    if adapter.parts.keys() - parts.keys():
        named = " and ".join(sorted(adapter.parts))
        raise ConfigError(
            f"train: {adapter.path} also has a LoRA on {named}; train it too (train_text_encoder=true)."
        )
    missing = " and ".join(sorted(parts.keys() - adapter.parts.keys()))
    raise ConfigError(
        f"train: {adapter.path}, which training continues from, has no LoRA on {missing}; leave "
        f"train_text_encoder out."
    )
