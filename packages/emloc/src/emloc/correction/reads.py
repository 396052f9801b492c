"""The data that a LoRA reads, summed in the directions of its rows: `C = Σ x (A x)ᵀ`, d_in × r per layer.

Summed while half of the calibration samples run through the base with the adapter as it is. Sums
wait on disk: together they are as large as the adapter's A.
"""

from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from emloc.errors import NumericalError
from emloc.linalg.finite import is_finite
from emloc.linalg.gram import moment_dtype


@dataclass
class Reads:
    """Sums of all layers.

    Attributes:
        folder: where they wait.
        layers: of which there are sums; those that stay as they are need none.
        calls: how many of the micro-batches, the first ones, are summed.
    """

    folder: Path
    layers: Container[str]
    calls: int = 0
    _open: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _kept: dict[str, Path] = field(default_factory=dict[str, Path])

    def wants(self, layer: str, call: int) -> bool:
        """Return whether the layer reads, in the micro-batch of that number, something to be summed.

        A layer whose sum was taken adds no more to it.
        """
        return call < self.calls and layer in self.layers and layer not in self._kept

    def has(self, layer: str) -> bool:
        """Return whether the layer's sum was taken."""
        return layer in self._kept

    def close_all(self) -> None:
        """Write all sums that are open; see `close`."""
        for layer in list(self._open):
            self.close(layer)

    def forget(self) -> None:
        """Drop all sums, to begin anew."""
        for path in self._kept.values():
            path.unlink()
        self._kept.clear()
        self._open.clear()

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
        """Write a layer's sum, if anything was added; no more is.

        Raises:
            NumericalError: it holds NaN or infinity.
        """
        if layer in self._open:
            if not is_finite(self._open[layer]):
                raise NumericalError(
                    f"Layer {layer}: its inputs hold NaN or infinity on the calibration data; check the base "
                    f"model's weights (emloc verify) and its dtype."
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{len(self._kept)}.safetensors"
            save_file({"crossed": self._open.pop(layer).cpu().contiguous()}, path)
            self._kept[layer] = path

    def crossed(self, layer: str) -> Tensor | None:
        """`C`, on the CPU; None for a layer that no sample reached."""
        path = self._kept.get(layer)
        return None if path is None else load_file(path)["crossed"]
