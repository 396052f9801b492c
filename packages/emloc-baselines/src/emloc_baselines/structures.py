"""The structures that can be taken out of a transformer block as a whole: key-value heads, head dimensions,
neurons.

A key-value head goes with the query heads that read it: rows of q, k and v and columns of the output
projection. A head dimension goes from all heads of a layer; under rotary positions i and i + d/2 turn
together and so go together. A neuron of an MLP goes with its rows of gate and up (or of the one input
layer) and its column of down. What is left is a smaller dense block that computes what the block would
with those parts at zero.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emloc.errors import ConfigError

HEADS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
)
"""Names that architectures give the layers before the heads."""

OUTPUTS = ("o_proj", "out_proj", "projection_layer", "dense", "out_lin")
"""Names that architectures give the layer behind the heads."""

OUTPUT_BESIDE = "output.dense"
"""Name of that layer beside the module of the heads, in BERT and its kin."""

MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("fc1",), "fc2"),
    (("up_proj",), "down_proj"),
    (("c_fc",), "c_proj"),
    (("lin1",), "lin2"),
    (("intermediate.dense",), "output.dense"),
    (("ffn",), "ffn_output"),
)
"""Names of an MLP's layers: those that write the neurons, and the one that reads them."""

SCALES = ("scaling", "scale")
"""Names of an attention's own factor of the scores, which stays when dimensions go."""


@dataclass(frozen=True)
class Attention:
    """The attention of a block.

    Attributes:
        name: module name.
        query, key, value, output: the layers' names.
        groups: key-value heads.
        queries: query heads that read each.
        head_dim: dimensions of a head.
        paired: whether dimension i goes with i + head_dim/2.
        norms: modules that normalise queries and keys and have a weight per dimension, with the layer
            whose outputs they read.
    """

    name: str
    query: str
    key: str
    value: str
    output: str
    groups: int
    queries: int
    head_dim: int
    paired: bool
    norms: tuple[tuple[str, str], ...]

    @property
    def units(self) -> int:
        """Head dimensions that can go, a pair counted once."""
        return self.head_dim // 2 if self.paired else self.head_dim

    def dims_of(self, units: Tensor) -> Tensor:
        """The head dimensions of units, in order."""
        return torch.cat([units, units + self.units]) if self.paired else units

    def query_rows(self, groups: Tensor, dims: Tensor) -> Tensor:
        """Rows of q, which are the columns of the output projection."""
        heads = (groups[:, None] * self.queries + torch.arange(self.queries)).reshape(-1)
        return (heads[:, None] * self.head_dim + dims).reshape(-1)

    def key_rows(self, groups: Tensor, dims: Tensor) -> Tensor:
        """Rows of k and v."""
        return (groups[:, None] * self.head_dim + dims).reshape(-1)


@dataclass(frozen=True)
class Mlp:
    """The MLP of a block.

    Attributes:
        name: module name.
        inputs: the layers whose rows are neurons; the last of them is the one that is not gated.
        output: the layer whose columns are neurons.
        neurons: how many there are.
    """

    name: str
    inputs: tuple[str, ...]
    output: str
    neurons: int


@dataclass(frozen=True)
class Structures:
    """The structures that a block has."""

    block: str
    attention: Attention
    mlp: Mlp


def find_structures(model: nn.Module, blocks: Sequence[str]) -> list[Structures]:
    """The structures of every block.

    Raises:
        ConfigError: a block has no attention or MLP of a form that is known, or several.
    """
    structures: list[Structures] = []
    for block in blocks:
        attentions = [a for name in _inside(model, block) if (a := attention_at(model, name))]
        mlps = [m for name in _inside(model, block) if (m := mlp_at(model, name))]
        if len(attentions) != 1 or len(mlps) != 1:
            kind = type(model.get_submodule(block)).__name__
            raise ConfigError(
                f"Heads and neurons of {block} ({kind}) cannot be removed: this needs one attention with "
                f"separate query, key and value layers (such as q_proj, k_proj, v_proj) and nothing else "
                f"with values for each head, and one MLP such as gate_proj, up_proj, down_proj; compare "
                f"with a method that leaves blocks whole."
            )
        structures.append(Structures(block, attentions[0], mlps[0]))
    return structures


def attention_at(model: nn.Module, name: str) -> Attention | None:
    """The attention that a module is, or None; in BERT and its kin the output lies beside it."""
    module: Any = model.get_submodule(name)
    layers = _linears(module)
    wanted = next((names for names in HEADS if layers.issuperset(names)), None)
    head_dim: int | None = getattr(module, "head_dim", getattr(module, "attention_head_size", None))
    if wanted is None or head_dim is None:
        return None
    parent = name.rpartition(".")[0]
    outputs = [f"{name}.{child}" for child in OUTPUTS if child in layers]
    if parent and OUTPUT_BESIDE in _linears(model.get_submodule(parent)):
        outputs.append(f"{parent}.{OUTPUT_BESIDE}")
    others = layers - {*wanted, *(output.removeprefix(f"{name}.") for output in outputs)}
    if not outputs or others or any(p is not None for p in module._parameters.values()):
        return None  # distances, gates and sinks would have to lose their heads too
    query, key, _ = (module.get_submodule(child) for child in wanted)
    groups = key.out_features // head_dim
    norms = tuple(
        (f"{name}.{child}", f"{name}.{layer}")
        for child, layer in zip(("q_norm", "k_norm"), wanted)
        if getattr(getattr(module, child, None), "weight", None) is not None
    )
    return Attention(
        name=name,
        **dict(zip(("query", "key", "value"), (f"{name}.{child}" for child in wanted))),
        output=outputs[0],
        groups=groups,
        queries=query.out_features // head_dim // groups,
        head_dim=head_dim,
        # The language models' attentions are given their positions as rotations.
        paired="position_embeddings" in inspect.signature(type(module).forward).parameters,
        norms=norms,
    )


def mlp_at(model: nn.Module, name: str) -> Mlp | None:
    """The MLP that a module is, or None."""
    module = model.get_submodule(name)
    layers = _linears(module)
    for inputs, output in MLPS:
        if layers.issuperset((*inputs, output)):
            neurons: int = module.get_submodule(output).in_features  # pyright: ignore[reportAssignmentType]
            return Mlp(name, tuple(f"{name}.{i}" for i in inputs), f"{name}.{output}", neurons)
    return None


def require_free_dimensions(model: nn.Module, attention: Attention) -> None:
    """Dimensions can go if scores keep their factor and, in pairs, if all turn in pairs (i, i + d/2).

    Raises:
        ConfigError: the model rotates otherwise, or works the factor out from the dimensions that are left.
    """
    module = model.get_submodule(attention.name)
    kind = type(module)
    if not any(hasattr(module, scale) for scale in SCALES):
        raise ConfigError(
            f"{kind.__name__} divides its scores by a factor that depends on the head size, so dimensions "
            f"cannot be removed; compare with a method that takes whole heads."
        )
    if not attention.paired:
        return
    rotate = getattr(sys.modules[kind.__module__], "rotate_half", None)
    probe = torch.arange(1.0, attention.head_dim + 1)
    first, second = probe.chunk(2)
    halves = rotate is not None and torch.equal(rotate(probe), torch.cat([-second, first]))
    frequencies = [b.numel() for n, b in model.named_buffers() if n.endswith("inv_freq")]
    if not halves or any(2 * count != attention.head_dim for count in frequencies):
        raise ConfigError(
            f"The head dimensions of {kind.__name__} are not rotated in pairs of i and i + d/2, so they "
            f"cannot be removed; compare with a method that takes whole heads."
        )


def _linears(module: nn.Module) -> set[str]:
    """Names of the linear layers inside."""
    return {
        name for name, inside in module.named_modules() if name and isinstance(inside, nn.Linear)
    }


def _inside(model: nn.Module, block: str) -> Iterator[str]:
    """Modules of a block, and the block itself, but for linear layers."""
    return (
        name for name, module in model.get_submodule(block).named_modules(prefix=block)
        if not isinstance(module, nn.Linear)
    )  # fmt: skip
