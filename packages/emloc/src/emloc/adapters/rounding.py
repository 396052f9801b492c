"""A base that bitsandbytes held in few bits: which, and what the weights of its layers then were.

They are `dequant(quantise(W))`, made anew from the original, one layer at a time.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.errors import ConfigError, NumericalError
from emloc.extend.capabilities import layers_in_few_bits
from emloc.extend.family import ModelFamily, StoredParameter
from emloc.linalg.finite import is_finite
from emloc.linalg.operator import Matrix
from emloc.machine.targets import imported

BITSANDBYTES = "emloc.integrations.bitsandbytes.rounded_weight"
"""The module of `dequant(quantise(W))`, which is bitsandbytes' own."""

DEQUANTISED = "dequantised"
"""The key of a corrected adapter's summary that says which dequantised weights it runs on."""


@dataclass(frozen=True)
class Rounding:
    """A setting of bitsandbytes.

    Attributes:
        bits: of a weight; 8: LLM.int8, and nothing else but `skip` matters.
        quant_type: of 4 bits.
        double_quant: whether the scales of 4 bits are quantised too.
        skip: modules that are left as they are; None: those that the library leaves by itself.
    """

    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    skip: Sequence[str] | None = None

    def as_json(self) -> dict[str, Any]:
        """The setting, for manifests."""
        return asdict(self)

    @property
    def shown(self) -> str:
        """The setting in messages."""
        if self.bits == 8:
            return "LLM.int8"
        return f"{self.quant_type.upper()} with{'' if self.double_quant else 'out'} double quantisation"

    @classmethod
    def runs_on(cls, manifest: Manifest | None) -> "Rounding | None":
        """The dequantised weights that an adapter runs on by its manifest; None: the base's own."""
        entry = None if manifest is None else manifest.summary.get(DEQUANTISED)
        return None if entry is None else cls(**cast("dict[str, Any]", entry))


@dataclass(frozen=True)
class RoundedBase:
    """`FrozenWeights` of a base in few bits.

    Attributes:
        places: how the base stores the weights of the layers that were rounded.
    """

    base: Checkpoint
    rounding: Rounding
    places: Mapping[str, StoredParameter]
    called: str = "the base in few bits"
    changed_by: str = "bitsandbytes holds in few bits"
    exempt: str = "name the layer in llm_int8_skip_modules if it was left as it is"
    # The last one: its mismatch is asked for in several directions, one after the other.
    _last: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @classmethod
    def of(
        cls, rounding: Rounding, family: ModelFamily, model: nn.Module, base: Checkpoint
    ) -> "RoundedBase":
        """The base in few bits.

        Args:
            model: its skeleton.

        Raises:
            ConfigError: the family does not know what bitsandbytes rounds, or it would round nothing.
            DependencyError: bitsandbytes is not installed.
        """
        imported(f"{BITSANDBYTES}:functional")()
        names = layers_in_few_bits(family, model, rounding.skip)
        places = {name: family.stored(model, f"{name}.weight", base) for name in names}
        known = {name: place for name, place in places.items() if place is not None}
        if not known:
            raise ConfigError(
                f"{base.name} has no layer that bitsandbytes holds in few bits; check "
                f"llm_int8_skip_modules, or pass the emulator that the adapter was trained on."
            )
        return cls(base, rounding, known)

    @property
    def layers(self) -> Collection[str]:
        """See `FrozenWeights`."""
        return self.places.keys()

    def operator(self, layer: str, device: torch.device | None = None) -> Matrix:
        """See `FrozenWeights`."""
        return Matrix(self.weight(layer).to(device))

    def weight(self, layer: str) -> Tensor:
        """`dequant(quantise(W))` of a layer, d_out × d_in, on the CPU (`emloc.integrations.bitsandbytes`).

        Raises:
            NumericalError: it holds NaN or infinity.
            DependencyError: bitsandbytes is not installed.
        """
        if layer not in self._last:
            rounded = cast(
                "Callable[[Tensor, Rounding], Tensor]", imported(f"{BITSANDBYTES}:rounded")
            )
            made = rounded(self.places[layer].layer_weight(self.base.read), self.rounding)
            if not is_finite(made):
                raise NumericalError(
                    f"Layer {layer} of {self.base.name}, in {self.rounding.bits} bits, holds NaN or "
                    f"infinity; check the base with emloc verify."
                )
            self._last.clear()
            self._last[layer] = made
        return self._last[layer]

    def parameter(self, layer: str) -> Tensor:
        """`weight`, transposed if the layer's module holds it so."""
        weight = self.weight(layer)
        return weight.T if self.places[layer].transposed else weight
