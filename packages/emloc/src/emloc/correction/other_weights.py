"""A candidate that runs on other weights than the model's own, such as the base's as they were in few bits.

Where one of the candidate's calls has run a layer, the layer runs once more with the other weight, and that
is its output. (A hook before it would come too late for a layer that is a unit by itself, in which calls wait
already.) The weight is made when the first of them comes, and goes with the unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from emloc.streaming.call import current_call
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

    def hooked(self, stream: UnitStream, name: str) -> Any:
        """Have a layer compute the candidate's calls with its other weight; returns the hook's handle.

        To be registered before hooks that add to the output.
        """
        module = stream.model.get_submodule(name)
        parameters = module._parameters  # pyright: ignore[reportPrivateUsage]
        made: list[nn.Parameter] = []

        def instead(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            call = current_call()
            if call is None or call.context[0] != self.candidate:
                return output
            if not made:
                weight = self.weight(name).to(stream.device, stream.dtype)
                made.append(nn.Parameter(weight, requires_grad=False))
            own, parameters["weight"] = parameters["weight"], made[0]
            try:
                return module.forward(*inputs)
            finally:
                parameters["weight"] = own

        return module.register_forward_hook(instead)
