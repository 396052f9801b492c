"""A decoder block of the Llama kind in sizes (`emloc.planning`): Llama, Mistral, Qwen2, Qwen3.

    h = x + o(attention(rotary(q(n(x))), rotary(k(n(x))), v(n(x))))
    y = h + down(act(gate(n(h))) · up(n(h)))

with RMS norms n, grouped heads, and optionally norms of queries and keys. Attention is torch's fused one;
where samples are padded it takes a mask, for which transformers repeats the heads of keys and values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from emloc.planning.blocks import BlockLayers, stack
from emloc.planning.operations import Forward, Layer
from emloc.planning.step import StepOptions
from emloc.planning.tape import Sized

BLOCKS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""transformers' classes with this forward."""

ACTIVATIONS = ("silu", "gelu", "relu")
"""Activations of one operation, which keeps its input."""


@dataclass(frozen=True)
class Decoder:
    """Sizes that all blocks share.

    Attributes:
        samples, tokens: of the micro-batch; tokens of the longest sample.
        width: of the hidden states.
        head: width of a head.
        heads, groups: of queries; of keys and values.
        normed: whether queries and keys have a norm.
    """

    samples: int
    tokens: int
    width: int
    head: int
    heads: int
    groups: int
    normed: bool


def decoder_of(block: nn.Module, config: Any, samples: int, tokens: int) -> Decoder | None:
    """The sizes that the blocks of a model share; None where they are of another kind.

    Args:
        config: of the language model.
    """
    if type(block).__name__ not in BLOCKS or config.hidden_act not in ACTIVATIONS:
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Decoder(
        samples,
        tokens,
        config.hidden_size,
        head,
        config.num_attention_heads,
        config.num_key_value_heads,
        hasattr(block.get_submodule("self_attn"), "q_norm"),
    )


def decoder_stack(
    forward: Forward,
    decoder: Decoder,
    blocks: Sequence[BlockLayers],
    embedded: Sized,
    padded: bool,
    options: StepOptions,
) -> Sized:
    """Embeddings through all blocks and the last norm."""
    given = positions(forward, decoder, embedded.itemsize, padded)
    run = partial(decoder_block, forward, decoder, given)
    [x] = stack(forward.tape, blocks, run, options.checkpointing, [embedded])
    forward.tape.reach_loss()
    return forward.rms_norm(x, decoder.width)


@dataclass
class Positions:
    """Tensors that every block is given besides its input: cosines, sines and the mask."""

    cos: Sized
    sin: Sized
    mask: Sized | None


def positions(forward: Forward, decoder: Decoder, itemsize: int, padded: bool) -> Positions:
    """Count what a model's forward makes before its blocks."""
    tape, numel = forward.tape, decoder.tokens * decoder.head
    mask = tape.new(decoder.samples * decoder.tokens**2, 1) if padded else None
    tape.work(numel * 4)
    return Positions(tape.new(numel, itemsize), tape.new(numel, itemsize), mask)


def decoder_block(
    forward: Forward, decoder: Decoder, given: Positions, layers: Mapping[str, Layer], x: Sized
) -> list[Sized]:
    """One block; `layers` by their names in it."""
    residual = x
    x = forward.rms_norm(x, decoder.width)
    x = _attention(forward, decoder, given, layers, x)
    x = forward.add(residual, x)
    residual = x
    x = forward.rms_norm(x, decoder.width)
    x = _mlp(forward, layers, x)
    return [forward.add(residual, x)]


def _mlp(forward: Forward, layers: Mapping[str, Layer], x: Sized) -> Sized:
    gate, up = forward.reading(x, layers["mlp.gate_proj"], layers["mlp.up_proj"])
    return forward.linear(forward.mul(forward.activation(gate()), up()), layers["mlp.down_proj"])


def _attention(
    forward: Forward, decoder: Decoder, given: Positions, layers: Mapping[str, Layer], x: Sized
) -> Sized:
    read = forward.reading(x, *(layers[f"self_attn.{part}_proj"] for part in "qkv"))
    q = read[0]()
    if decoder.normed:
        q = forward.rms_norm(q, decoder.head)
    k = read[1]()
    if decoder.normed:
        k = forward.rms_norm(k, decoder.head)
    v = read[2]()
    q, k = rotary(forward, q, given), rotary(forward, k, given)
    out = _fused(forward, decoder, given, q, k, v)
    return forward.linear(out, layers["self_attn.o_proj"])


def _fused(
    forward: Forward, decoder: Decoder, given: Positions, q: Sized, k: Sized, v: Sized
) -> Sized:
    if given.mask is None:
        return forward.attention(q, k, v, decoder.head)
    if decoder.groups < decoder.heads:
        k, v = (forward.new(part, numel=q.numel) for part in (k, v))
    mask = forward.tape.new(given.mask.numel, q.itemsize)
    return forward.attention(q, k, v, decoder.head, mask)


def rotary(forward: Forward, x: Sized, given: Positions) -> Sized:
    """`x · cos + rotate_half(x) · sin`."""
    turned = forward.new(x, given.cos)
    half = x.numel // 2
    other = forward.new(forward.slice(x, half))
    rotated = forward.cat(other, forward.slice(x, half))
    del other
    rotated = forward.new(rotated, given.sin)
    return forward.add(turned, rotated)
