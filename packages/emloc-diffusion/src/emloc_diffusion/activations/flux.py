"""`FluxTransformer2DModel` in sizes: double blocks of two streams, single blocks of one.

Modulation reads the timestep alone and wants no gradient, so of a product with it only the small factor is
kept. Rotary embeddings and norms of queries and keys compute in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from emloc.extend.family import Batch
from emloc.planning.blocks import BlockLayers, by_block, stack
from emloc.planning.operations import Forward, Layer
from emloc.planning.step import FLOAT32, StepOptions, StepSizes, StepTape
from emloc.planning.tape import Sized
from emloc_diffusion.activations.ends import batch_sizes, squared_error


@dataclass(frozen=True)
class Streams:
    """Sizes of both streams.

    Attributes:
        image, text: rows, all samples counted.
        copies: whether a part of the joint stream has to be copied to be contiguous.
    """

    width: int
    head: int
    image: int
    text: int
    copies: bool


def flux_sizes(
    model: nn.Module, layers: Mapping[str, Layer], batch: Batch, options: StepOptions
) -> StepSizes | None:
    """See `PlannedFamily`."""
    flux: Any = model
    samples, _, height, rows = batch["sample"].shape
    text = samples * batch["encoder_hidden_states"].shape[1]
    head = flux.config.attention_head_dim
    width = flux.config.num_attention_heads * head
    streams = Streams(width, head, samples * (height // 2) * (rows // 2), text, samples > 1)
    forward = Forward(tape := StepTape(), options.precision, options.on_gpu)
    given = batch_sizes(forward, batch)
    item, config = options.precision.weights, flux.config
    packed = tape.new(batch["sample"].numel(), item)
    rotary = tape.new(2 * (streams.image + text) // samples * head, FLOAT32)
    image = forward.dense(packed, config.in_channels, width)
    prompts = given[list(batch).index("encoder_hidden_states")]
    state = [forward.dense(prompts, config.joint_attention_dim, width), image]
    del image
    for kind, run in (("transformer_blocks", _double), ("single_transformer_blocks", _single)):
        names = [f"{kind}.{index}" for index in range(len(getattr(flux, kind)))]
        block = partial(run, forward, streams, rotary)
        state = stack(tape, by_block(layers, names), block, options.checkpointing, state)
    tape.reach_loss()
    x = _modulated(forward, streams, state[1])
    x = forward.linear(x, layers["proj_out"])
    x = forward.new(x)  # unpacked: a copy
    del packed, given, state, rotary
    return squared_error(forward, x)


def _modulated(forward: Forward, streams: Streams, x: Sized) -> Sized:
    """`norm(x) · (1 + scale) + shift`."""
    x = forward.layer_norm(x, streams.width)
    return _plus(forward, forward.weighted(x))


def _plus(forward: Forward, x: Sized) -> Sized:
    out = forward.tape.new(x.numel, x.itemsize)
    return forward.tape.operation([x], out, passes=True)


def _double(
    forward: Forward,
    streams: Streams,
    rotary: Sized,
    layers: BlockLayers,
    text: Sized,
    image: Sized,
) -> list[Sized]:
    """Each stream with weights of its own; attention over both."""
    normed = _modulated(forward, streams, image)
    normed_text = _modulated(forward, streams, text)
    attended, attended_text = _joint_attention(
        forward, streams, rotary, layers, normed, normed_text
    )
    attended = forward.weighted(attended)  # the gate
    image = forward.add(image, attended)
    normed = _modulated(forward, streams, image)
    out = _feed_forward(forward, layers, "ff", normed)
    out = forward.weighted(out)
    image = forward.add(image, out)
    attended_text = forward.weighted(attended_text)
    text = forward.add(text, attended_text)
    normed_text = _modulated(forward, streams, text)
    out_text = _feed_forward(forward, layers, "ff_context", normed_text)
    text = forward.add(text, forward.weighted(out_text))
    return [text, image]


def _feed_forward(forward: Forward, layers: BlockLayers, name: str, x: Sized) -> Sized:
    x = forward.activation(forward.linear(x, layers[f"{name}.net.0.proj"]))
    return forward.linear(x, layers[f"{name}.net.2"])


def _joint_attention(
    forward: Forward, streams: Streams, rotary: Sized, layers: BlockLayers, x: Sized, text: Sized
) -> tuple[Sized, Sized]:
    read = forward.reading(x, *(layers[f"attn.to_{part}"] for part in "qkv"))
    added = forward.reading(text, *(layers[f"attn.add_{part}_proj"] for part in "qkv"))
    q, k, v = read[0](), read[1](), read[2]()
    q2, k2, v2 = added[0](), added[1](), added[2]()
    q, k = _normed(forward, streams, q), _normed(forward, streams, k)
    q2, k2 = _normed(forward, streams, q2), _normed(forward, streams, k2)
    q, k, v = forward.cat(q2, q), forward.cat(k2, k), forward.cat(v2, v)
    q, k = _rotated(forward, rotary, q), _rotated(forward, rotary, k)
    out = forward.attention(q, k, v, streams.head)
    text, x = forward.split(out, [streams.text * streams.width, streams.image * streams.width])
    x = _contiguous(forward, streams, x)
    x = forward.linear(x, layers["attn.to_out.0"])
    text = _contiguous(forward, streams, text)
    return x, forward.linear(text, layers["attn.to_add_out"])


def _contiguous(forward: Forward, streams: Streams, x: Sized) -> Sized:
    return forward.new(x) if streams.copies else x


def _normed(forward: Forward, streams: Streams, x: Sized) -> Sized:
    """torch's RMSNorm: one kernel on a GPU, a chain of operations in float32 elsewhere."""
    if forward.on_gpu:
        return forward.layer_norm(x, streams.head)
    item = x.itemsize
    x = forward.cast(x, FLOAT32)
    x = forward.divided_by_rms(x, streams.head)
    return forward.cast(forward.weighted(x), item)


def _rotated(forward: Forward, rotary: Sized, x: Sized) -> Sized:
    """`x · cos + turned(x) · sin` in float32."""
    item = x.itemsize
    real, imaginary = forward.split(x, [x.numel // 2] * 2)
    turned = forward.cat(forward.new(imaginary), real)
    y = forward.add(
        forward.new(forward.cast(x, FLOAT32), rotary),
        forward.new(forward.cast(turned, FLOAT32), rotary),
    )
    return forward.cast(y, item)


def _single(
    forward: Forward,
    streams: Streams,
    rotary: Sized,
    layers: BlockLayers,
    text: Sized,
    image: Sized,
) -> list[Sized]:
    """Both streams as one; attention and feed-forward side by side."""
    x = forward.cat(text, image)
    residual = x
    normed = _modulated(forward, streams, x)
    wide = forward.activation(forward.linear(normed, layers["proj_mlp"]))
    attended = _attention(forward, streams, rotary, layers, normed)
    x = forward.cat(attended, wide)
    x = forward.weighted(forward.linear(x, layers["proj_out"]))
    x = forward.add(residual, x)
    sizes = [streams.text * streams.width, streams.image * streams.width]
    return [forward.slice(x, numel) for numel in sizes]


def _attention(
    forward: Forward, streams: Streams, rotary: Sized, layers: BlockLayers, x: Sized
) -> Sized:
    read = forward.reading(x, *(layers[f"attn.to_{part}"] for part in "qkv"))
    q, k, v = read[0](), read[1](), read[2]()
    q, k = _normed(forward, streams, q), _normed(forward, streams, k)
    q, k = _rotated(forward, rotary, q), _rotated(forward, rotary, k)
    return forward.attention(q, k, v, streams.head)
