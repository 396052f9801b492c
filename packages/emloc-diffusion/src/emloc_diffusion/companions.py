"""The memory that a pipeline's other models take while they encode pictures and prompts: VAE and text
encoders.

They are known by their configs and run on fake tensors, one picture and one prompt, in float32.
"""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from emloc.artefacts.json_files import read_json
from emloc.artefacts.read_errors import reading
from emloc.integrations.empty_weights import empty_weights
from emloc.planning.family import OtherModel
from emloc.planning.live import LiveBytes
from emloc.planning.trace import materialise

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
T5_TOKENS = 512
"""The longest prompt of the stock pipelines; a T5 has no length of its own."""


@cache
def companions(path: Path, resolution: int) -> Mapping[str, OtherModel]:
    """Sizes by component, for those that the folder, or the one above, has a config of."""
    root = path if (path / "vae").is_dir() else path.parent
    sizes: dict[str, OtherModel] = {}
    if (root / "vae" / "config.json").is_file():
        sizes["vae"] = _sized(root / "vae" / "config.json", lambda c: _vae(c, resolution))
    for name in TEXT_ENCODERS:
        if (root / name / "config.json").is_file():
            sizes[name] = _sized(root / name / "config.json", _text_encoder)
    return sizes


def _sized(path: Path, size: Callable[[Mapping[str, Any]], OtherModel]) -> OtherModel:
    config = read_json(path)
    with reading(path, "does not describe a diffusers or transformers model", "download it again"):
        return size(config)


def _vae(config: Mapping[str, Any], resolution: int) -> OtherModel:
    from diffusers import AutoencoderKL

    known = {key: value for key, value in config.items() if not key.startswith("_")}
    with empty_weights():
        model = AutoencoderKL(**known)
    channels = config.get("in_channels", 3)

    def run(model: Any) -> Any:
        return model.encode(torch.zeros(1, channels, resolution, resolution)).latent_dist.mean

    return _counted(model, run)


def _text_encoder(config: Mapping[str, Any]) -> OtherModel:
    import transformers

    content = {key: value for key, value in config.items() if not key.startswith("_")}
    settings = transformers.AutoConfig.for_model(content.pop("model_type"), **content)
    kind: Any = getattr(transformers, config["architectures"][0])
    with empty_weights():
        model = kind._from_config(settings)
    tokens = config.get("max_position_embeddings", T5_TOKENS)

    def run(model: Any) -> Any:
        return model(torch.zeros(1, tokens, dtype=torch.int64))

    return _counted(model, run)


def _counted(model: nn.Module, run: Callable[[Any], Any]) -> OtherModel:
    """Weights in float32, and the most that running it makes."""
    model = model.float().eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        materialise(model)
        with LiveBytes() as live:
            live.mark([*model.parameters(), *model.buffers()], "weights")
            run(model)
    return OtherModel(sum(p.numel() for p in model.parameters()), live.peak.total)
