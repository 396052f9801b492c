"""A candidate that runs on other weights than the model's own, such as the base's as they were in few bits.

A layer has the other weight while one of the candidate's calls runs through it. Calls change turns between
units alone, so no other call meets it; it is made when the first of them comes, and goes with the unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from emloc.streaming.lockstep import current_call
from emloc.streaming.stream import UnitStream


@dataclass(frozen=True)
class OtherWeights:
    """A candidate that runs on other weights than the model's own.

    Attributes:
        candidate: its place.
        layers: names of the layers whose weights are others.
        weight: gives one, as the layer's module holds it.
    """

    candidate: int
    layers: Sequence[str]
    weight: Callable[[str], Tensor]

    def hooked(self, stream: UnitStream, name: str) -> list[Any]:
        """Give a layer its other weight while the candidate's calls run through it; the hooks' handles."""
        module, held = stream.model.get_submodule(name), dict[str, nn.Parameter]()
        parameters = module._parameters  # pyright: ignore[reportPrivateUsage]

        def before(_: nn.Module, inputs: object) -> None:
            call = current_call()
            if call is None or call.context[0] != self.candidate:
                return
            if "other" not in held:
                weight = self.weight(name).to(stream.device, stream.dtype)
                held["other"] = nn.Parameter(weight, requires_grad=False)
            own = parameters["weight"]
            assert own is not None
            held["own"], parameters["weight"] = own, held["other"]

        def after(_: nn.Module, inputs: object, output: object) -> None:
            if "own" in held:
                parameters["weight"] = held.pop("own")

        return [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
        ]
