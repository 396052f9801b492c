"""A training step of an InternVL in sizes: vision tower, projector, decoder, loss over all logits.

The vision tower keeps nothing for the backward as long as nothing in it is trained, whatever it takes to
run it. With gradient checkpointing transformers asks for gradients at its embeddings as well, so that its
blocks keep their inputs and run twice in any case.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from emloc.extend.family import Batch
from emloc.integrations.transformers.decoder_sizes import decoder_of, decoder_stack
from emloc.integrations.transformers.loss_sizes import logits_loss
from emloc.integrations.transformers.skeleton import repeated_blocks
from emloc.integrations.transformers.vocabulary import head_of
from emloc.planning.blocks import BlockLayers, by_block, stack
from emloc.planning.operations import Forward, Layer
from emloc.planning.step import FLOAT32, StepOptions, StepSizes, StepTape
from emloc.planning.tape import Sized
from emloc_vlm.parts import part_of

VISION_BLOCK = "InternVLVisionLayer"
PROJECTOR = "model.multi_modal_projector"


@dataclass(frozen=True)
class Vision:
    """A vision tower's sizes.

    Attributes:
        width: of the hidden states.
        tokens: patches of all tiles, and one more per tile.
        patches: of all tiles.
        head: width of a head.
        rms: whether norms are RMS norms.
        normed: whether queries and keys have a norm.
    """

    width: int
    tokens: int
    patches: int
    head: int
    rms: bool
    normed: bool


def step_sizes(
    model: nn.Module, layers: Mapping[str, Layer], batch: Batch, options: StepOptions
) -> StepSizes | None:
    """See `PlannedFamily`."""
    config: Any = model.config
    names = repeated_blocks(model)
    seen = [name for name in names if part_of(name) == "vision"]
    read = [name for name in names if part_of(name) == "language"]
    samples, tokens = batch["input_ids"].shape
    text = config.text_config
    decoder = decoder_of(model.get_submodule(read[0]), text, samples, tokens) if read else None
    if decoder is None or not seen or "pixel_values" not in batch:
        return None
    if type(model.get_submodule(seen[0])).__name__ != VISION_BLOCK:
        return None
    forward = Forward(tape := StepTape(), options.precision, options.on_gpu)
    given = tape.new(samples * tokens * 3, 8)
    pixels = tape.new(batch["pixel_values"].numel(), FLOAT32)
    x = tape.new(samples * tokens * decoder.width, options.precision.weights)
    if options.checkpointing:
        x = tape.leaf(x)
    tower = by_block(layers, seen)
    last, features = _see(forward, config, tower, layers, pixels, batch, options)
    mask = tape.new(samples * tokens, 1)
    x = _scatter(forward, x, features, mask)
    x = decoder_stack(
        forward, decoder, by_block(layers, read), x, "attention_mask" in batch, options
    )
    del last  # held by the model's forward, as the features are by its output
    tape.reach_head()
    head = layers.get(head_of(model))
    work = head.working if head else 0
    loss = logits_loss(forward, x, decoder.width, text.vocab_size, work)
    del x, features
    sizes = tape.finish(loss)
    del given, pixels
    return sizes


def _see(
    forward: Forward,
    config: Any,
    tower: list[BlockLayers],
    layers: Mapping[str, Layer],
    pixels: Sized,
    batch: Batch,
    options: StepOptions,
) -> tuple[Sized, Sized]:
    """The tower's last hidden states, and what the projector makes of them."""
    tape, shape, seen = forward.tape, batch["pixel_values"].shape, config.vision_config
    patch = seen.patch_size if isinstance(seen.patch_size, int) else seen.patch_size[0]
    patches = shape[0] * (shape[2] // patch) * (shape[3] // patch)
    vision = Vision(
        seen.hidden_size,
        patches + shape[0],
        patches,
        seen.hidden_size // seen.num_attention_heads,
        seen.norm_type == "rms_norm",
        seen.use_qk_norm,
    )
    x = _embed(forward, vision, pixels, options)
    run = partial(vision_block, forward, vision)
    [x] = stack(tape, tower, run, options.checkpointing, [x])
    last = x if seen.use_mean_pooling else forward.layer_norm(x, vision.width)
    x = forward.slice(last, vision.patches * vision.width)
    x = forward.new(forward.new(x))  # pixel shuffle: two copies
    x = forward.layer_norm(x, 4 * vision.width)
    x = forward.activation(forward.linear(x, layers[f"{PROJECTOR}.linear_1"]))
    return last, forward.linear(x, layers[f"{PROJECTOR}.linear_2"])


def _embed(forward: Forward, vision: Vision, pixels: Sized, options: StepOptions) -> Sized:
    tape, precision = forward.tape, options.precision
    pixels = forward.cast(pixels, precision.weights)
    x = tape.new(vision.patches * vision.width, precision.product)
    if options.checkpointing:
        x = tape.leaf(x)
    class_token = tape.new(vision.tokens * vision.width - x.numel, precision.weights)
    x = forward.cat(x, class_token)
    return forward.new(x)  # + positions


def vision_block(forward: Forward, vision: Vision, layers: BlockLayers, x: Sized) -> list[Sized]:
    """`h = x + λ₁ · proj(attention(n(x)))`, `y = h + λ₂ · fc2(gelu(fc1(n(h))))`."""
    attended = _attention(forward, vision, layers, _norm(forward, vision, x))
    attended = forward.weighted(attended)
    x = forward.add(attended, x)
    normed = _norm(forward, vision, x)
    out = forward.activation(forward.linear(normed, layers["mlp.fc1"]))
    out = forward.linear(out, layers["mlp.fc2"])
    del normed
    out = forward.weighted(out)
    return [forward.add(out, x)]


def _norm(forward: Forward, vision: Vision, x: Sized) -> Sized:
    return (forward.rms_norm if vision.rms else forward.layer_norm)(x, vision.width)


def _attention(forward: Forward, vision: Vision, layers: BlockLayers, x: Sized) -> Sized:
    read = forward.reading(x, *(layers[f"attention.{part}_proj"] for part in "qkv"))
    q, k, v = read[0](), read[1](), read[2]()
    if vision.normed:
        q = forward.rms_norm(q, vision.width)
        k = forward.rms_norm(k, vision.width)
    out = forward.attention(q, k, v, vision.head)
    return forward.linear(out, layers["attention.projection_layer"])


def _scatter(forward: Forward, x: Sized, features: Sized, mask: Sized) -> Sized:
    """Features in the places of image tokens (`masked_scatter`)."""
    features = forward.cast(features, x.itemsize)
    out = forward.tape.new(x.numel, x.itemsize)
    return forward.tape.operation([x, features], out, [mask])
