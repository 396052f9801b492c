"""A model of torch alone: blocks of a convolution and three linear layers that tell small pictures apart."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

MODEL_TYPE = "emloc-toy"


@dataclass(frozen=True)
class ToySizes:
    """The numbers in a toy's `config.json`.

    Attributes:
        channels: of a picture.
        side: of a picture, in pixels.
        width: numbers per pixel between blocks.
        hidden: numbers per pixel within a block.
    """

    channels: int = 3
    side: int = 6
    classes: int = 5
    blocks: int = 3
    width: int = 12
    hidden: int = 20

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "ToySizes":
        """The sizes that a parsed `config.json` gives."""
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})

    def as_config(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {"model_type": MODEL_TYPE, **asdict(self)}


class ToyBlock(nn.Module):
    """A 3 × 3 convolution and a gated layer per pixel; `gate` and `up` read one tensor."""

    def __init__(self, sizes: ToySizes) -> None:
        super().__init__()
        self.conv = nn.Conv2d(sizes.width, sizes.width, 3, padding=1)
        self.norm = nn.LayerNorm(sizes.width)
        self.gate = nn.Linear(sizes.width, sizes.hidden)
        self.up = nn.Linear(sizes.width, sizes.hidden)
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures × height × width × numbers per pixel, as it returns them."""
        pixels = pixels + self.conv(pixels.permute(0, 3, 1, 2)).tanh().permute(0, 2, 3, 1)
        normed = self.norm(pixels)
        return pixels + self.down(silu(self.gate(normed)) * self.up(normed))


class ToyModel(nn.Module):
    """A stem, blocks, and a head on the mean of all pixels; stem and head stay dense."""

    rows: Tensor

    def __init__(self, sizes: ToySizes) -> None:
        super().__init__()
        self.stem = nn.Linear(sizes.channels, sizes.width)
        self.blocks = nn.ModuleList(ToyBlock(sizes) for _ in range(sizes.blocks))
        self.head = nn.Linear(sizes.width, sizes.classes)
        # Not of the checkpoint, so it is made whole where parameters are on the meta device.
        rows = torch.linspace(-1, 1, sizes.side, device="cpu").reshape(-1, 1, 1)
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Score the classes of pictures × channels × height × width."""
        pixels = self.stem(pictures.permute(0, 2, 3, 1)) + self.rows
        for block in self.blocks:
            pixels = block(pixels)
        return self.head(pixels.mean((1, 2)))


def random_toy(sizes: ToySizes, seed: int) -> ToyModel:
    """A float32 model with seeded weights, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ToyModel(sizes).eval()
