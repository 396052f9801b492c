"""The data that a LoRA reads, summed in the directions of its rows: `C = Σ x (A x)ᵀ`, d_in × r per layer.

Summed while the first half of the calibration samples run through the base with the adapter as it is. Sums
wait on disk: together they are as large as the adapter's A.
"""

from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from emloc.linalg.gram import moment_dtype


@dataclass
class Reads:
    """Sums of all layers.

    Attributes:
        folder: where they wait.
        calls: how many of the micro-batches, the first ones, are summed.
    """

    folder: Path
    calls: int
    _open: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _kept: dict[str, Path] = field(default_factory=dict[str, Path])

    def fold(self, layer: str, inputs: Tensor, read: Tensor) -> None:
        """Add rows.

        Args:
            inputs: tokens × d_in.
            read: `inputs @ Aᵀ`, tokens × r.
        """
        high = moment_dtype(inputs.dtype)
        part = inputs.to(high).T @ read.to(high)
        self._open[layer] = part if layer not in self._open else self._open[layer].add_(part)

    def close(self, layer: str) -> None:
        """Write a layer's sum, if anything was added; no more is."""
        if layer in self._open:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{len(self._kept)}.safetensors"
            save_file({"crossed": self._open.pop(layer).cpu().contiguous()}, path)
            self._kept[layer] = path

    def crossed(self, layer: str) -> Tensor | None:
        """`C`, on the CPU; None for a layer that no sample reached."""
        path = self._kept.get(layer)
        return None if path is None else load_file(path)["crossed"]
