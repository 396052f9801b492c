"""A training step of a causal language model in sizes: decoder blocks, and TRL's loss.

TRL (1.16) never makes the logits of all tokens. It multiplies tiles of 4096 tokens by 32768 rows of the
head, folds each into running sums, and makes it once more on the way back. Without Triton, a tile's loss
is a chain of operations in float32, whose results make up its memory. Where few tokens are labelled, a CPU
takes less than that (`emloc_llm.training.Trainer`); how many will be is not known beforehand. A streamed
model gives the logits of its labelled tokens, here of all: its head has no weight outside of its own call.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from emloc.extend.family import Batch
from emloc.integrations.transformers.decoder_sizes import Decoder, decoder_of, decoder_stack
from emloc.integrations.transformers.loss_sizes import logits_loss
from emloc.integrations.transformers.skeleton import repeated_blocks
from emloc.integrations.transformers.vocabulary import head_of
from emloc.planning.blocks import by_block
from emloc.planning.operations import Forward, Layer
from emloc.planning.step import FLOAT32, StepOptions, StepSizes, StepTape
from emloc.planning.tape import Sized, Storage

TILE_TOKENS, TILE_ROWS = 4096, 32768

FORWARD_COPIES, BACKWARD_COPIES = 3, 7
"""Float32 tiles alive at once in the loss's operations, where there is no fused kernel."""


def step_sizes(
    model: nn.Module, layers: Mapping[str, Layer], batch: Batch, options: StepOptions
) -> StepSizes | None:
    """See `PlannedFamily`."""
    config: Any = model.config
    names = repeated_blocks(model)
    samples, tokens = batch["input_ids"].shape
    decoder = decoder_of(model.get_submodule(names[0]), config, samples, tokens)
    if decoder is None:
        return None
    forward = Forward(tape := StepTape(), options.precision, options.on_gpu)
    given = tape.new(samples * tokens * len(batch), 8)
    x = tape.new(samples * tokens * decoder.width, options.precision.weights)
    if options.checkpointing:  # so that a gradient reaches the blocks, which run twice
        x = tape.leaf(x)
    x = decoder_stack(
        forward, decoder, by_block(layers, names), x, "attention_mask" in batch, options
    )
    tape.reach_head()
    if options.streamed:
        loss = logits_loss(forward, x, decoder.width, config.vocab_size)
    else:
        coded = any(layer.working for name, layer in layers.items() if name == head_of(model))
        loss = fused_loss(forward, decoder, x, config.vocab_size, options.on_gpu, coded)
    del x
    sizes = tape.finish(loss)
    del given
    return sizes


def fused_loss(
    forward: Forward, decoder: Decoder, x: Sized, vocabulary: int, on_gpu: bool, coded: bool = False
) -> Sized:
    """Hidden states to the loss of the next token, tile by tile.

    Args:
        coded: whether a tile's rows of the head are made when they are multiplied.
    """
    tape, rows = forward.tape, decoder.samples * (decoder.tokens - 1)
    hidden = forward.slice(x, rows * decoder.width)
    if decoder.samples > 1 or on_gpu:
        hidden = forward.new(hidden)
    tokens, columns = min(rows, TILE_TOKENS), min(vocabulary, TILE_ROWS)
    buffer = tokens * TILE_ROWS * forward.precision.product
    tile, flags = tokens * columns * FLOAT32, tokens * columns
    width = 0 if on_gpu or hidden.itemsize == FLOAT32 else columns * decoder.width * FLOAT32
    sums = tape.new(rows * 9, FLOAT32)  # running sums and targets
    if coded:
        buffer += columns * decoder.width * forward.precision.weights
    tape.work(buffer + (0 if on_gpu else FORWARD_COPIES * tile + flags))
    out = tape.new(rows, FLOAT32)

    def back(_: list[Storage]) -> list[Storage]:
        gradient = Storage(tape, rows * decoder.width * FLOAT32)
        work = 0 if on_gpu else max(BACKWARD_COPIES * tile + flags, tile + width)
        tape.work(buffer + work)
        return [gradient if hidden_item == FLOAT32 else Storage(tape, hidden_bytes)]

    hidden_item, hidden_bytes = hidden.itemsize, hidden.nbytes
    [out] = tape.custom([hidden], [out], [hidden, sums], back)
    return tape.operation([out], tape.new(1, FLOAT32))
