"""Which layers become which factors: groups, ranks, and the layers that stay dense with the reason."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from emloc.compression.rank import decide, match_pattern
from emloc.config import CompressConfig
from emloc.errors import ConfigError
from emloc.linalg.allocation import rank_range


@dataclass(frozen=True)
class Group:
    """Layers whose weights are stacked and share one right factor.

    Attributes:
        layers: names, in the order of the stack.
        rank: of the stack.
        d_out: outputs of each layer.
        d_in: inputs of all.
        span: least and largest rank that allocation may give it; None: the rank is fixed.
    """

    layers: tuple[str, ...]
    rank: int
    d_out: tuple[int, ...]
    d_in: int
    span: tuple[int, int] | None = None

    @property
    def owner(self) -> str:
        """The layer under whose name the shared right factor is stored."""
        return self.layers[0]

    @property
    def widest(self) -> int:
        """The largest rank that it may come to have."""
        return self.rank if self.span is None else self.span[1]


@dataclass(frozen=True)
class Plan:
    """The groups to compress and what stays dense."""

    groups: tuple[Group, ...]
    kept_dense: dict[str, str]

    def within(self, block: str) -> list[Group]:
        """The groups of one block."""
        return [group for group in self.groups if f"{group.owner}.".startswith(f"{block}.")]

    def with_ranks(self, ranks: Mapping[str, int]) -> "Plan":
        """The same groups with other ranks, by owner."""
        groups = [replace(group, rank=ranks.get(group.owner, group.rank)) for group in self.groups]
        return replace(self, groups=tuple(groups))


def make_plan(
    layer_groups: Sequence[Sequence[str]],
    shape_of: Callable[[str], tuple[int, int] | None],
    config: CompressConfig,
) -> Plan:
    """Apply ratios, patterns and exclusions to a family's layer groups.

    Args:
        shape_of: `(d_out, d_in)` of a layer; None if its weight is not one tensor of the checkpoint.
    """
    excluded = dict.fromkeys(config.exclude, True)
    names = [name for group in layer_groups for name in group]
    refuse_idle_patterns(names, config, ("exclude", "keep_ratio_pattern", "rank_pattern"))
    groups: list[Group] = []
    dense: dict[str, str] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for candidates in layer_groups:
        # Layers that patterns treat differently cannot share a rank, so they do not share factors.
        by_pattern: dict[object, list[str]] = {}
        for name in candidates:
            if match_pattern(excluded, name):
                dense[name] = "excluded"
                continue
            shape = shape_of(name)
            if shape is None:
                dense[name] = "its weight is part of a fused tensor in the checkpoint"
                continue
            shapes[name] = shape
            key: object = (
                match_pattern(config.rank_pattern, name),
                match_pattern(config.keep_ratio_pattern, name),
            )
            by_pattern.setdefault(key if config.share_factors else name, []).append(name)
        for layers in by_pattern.values():
            d_out, d_in = tuple(shapes[name][0] for name in layers), shapes[layers[0]][1]
            decision = decide(
                layers[0],
                sum(d_out),
                d_in,
                config.keep_ratio,
                config.keep_ratio_pattern,
                config.rank_pattern,
            )
            if decision.rank is None:
                dense |= dict.fromkeys(layers, decision.reason)
            else:
                span = None
                if config.keep_ratio_allocation == "error" and not _is_named(layers[0], config):
                    span = rank_range(decision.rank, sum(d_out), d_in)
                groups.append(Group(tuple(layers), decision.rank, d_out, d_in, span))
    return Plan(tuple(groups), dense)


def _is_named(layer: str, config: CompressConfig) -> bool:
    """Whether an option gives this layer a rank of its own."""
    patterns = (config.rank_pattern, config.keep_ratio_pattern)
    return any(match_pattern(pattern, layer) is not None for pattern in patterns)


def refuse_idle_patterns(
    layers: Sequence[str], config: CompressConfig, options: Sequence[str]
) -> None:
    """A pattern that matches nothing is a typo, and would be found out hours later.

    Raises:
        ConfigError: names the option, the pattern and a layer that there is.
    """
    for option in options:
        patterns: Sequence[str] = list(getattr(config, option))
        for pattern in patterns:
            if not any(match_pattern({pattern: True}, name) for name in layers):
                raise ConfigError(
                    f"{option}: {pattern!r} matches no layer; it must match the end of a name such "
                    f"as {layers[0] if layers else '(none)'}."
                )
