"""`UNet2DConditionModel` in sizes: resnets, transformers, skips, changes of resolution.

Frozen convolutions keep their inputs, which are most of what a UNet keeps: torch asks for an input's
gradient and a weight's with one formula, and saves for both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from emloc.extend.family import Batch
from emloc.planning.blocks import BlockLayers, by_block
from emloc.planning.operations import Forward, Layer
from emloc.planning.step import StepOptions, StepSizes, StepTape
from emloc.planning.tape import Sized
from emloc_diffusion.activations.ends import batch_sizes, squared_error


@dataclass
class UNet:
    """A UNet being run.

    Attributes:
        pixels: of all samples at the present resolution.
        text: the prompts' embeddings.
        blocks: the layers of transformer blocks, by the block's name.
    """

    model: Any
    layers: Mapping[str, Layer]
    forward: Forward
    samples: int
    pixels: int
    text: Sized
    checkpointing: bool
    blocks: Mapping[str, BlockLayers]

    def run(self, name: str, x: Sized) -> Sized:
        """A module by its name: resnet, transformer, or change of resolution."""
        module = self.model.get_submodule(name)
        if FORWARDS[type(module).__name__] is not _transformer:  # its blocks are inside
            self.reach(name)
        return FORWARDS[type(module).__name__](self, name, module, x)

    def reach(self, name: str) -> None:
        """Each block is of a kind of its own: equal ones may run at different resolutions."""
        self.forward.tape.reach_block(name)

    def once_or_twice(self, block: Any, x: Sized) -> Sized:
        """A block that checkpointing runs twice."""
        if not self.checkpointing:
            return block(x)
        pixels = self.pixels

        def run(given: Sized) -> list[Sized]:
            self.pixels = pixels
            return [block(given)]

        return self.forward.tape.checkpoint(run, x)[0]

    def conv(self, name: str, x: Sized) -> Sized:
        """A convolution that keeps the resolution."""
        return self.forward.conv(x, self.layers[name], self.pixels)


def unet_sizes(
    model: nn.Module, layers: Mapping[str, Layer], batch: Batch, options: StepOptions
) -> StepSizes | None:
    """See `PlannedFamily`; None where a module of another kind is among the blocks."""
    unet: Any = model
    names = [*_names(unet, "down_blocks"), *_names(unet, "up_blocks")]
    modules = [module for name in names for module in _parts(unet.get_submodule(name))]
    if any(type(module).__name__ not in FORWARDS for module in modules):
        return None
    if unet.mid_block is None or type(unet.mid_block).__name__ != "UNetMidBlock2DCrossAttn":
        return None
    samples, _, height, width = batch["sample"].shape
    forward = Forward(tape := StepTape(), options.precision, options.on_gpu)
    given = batch_sizes(forward, batch)
    text = given[list(batch).index("encoder_hidden_states")]
    names = [n for n, m in unet.named_modules() if type(m).__name__ == "BasicTransformerBlock"]
    blocks = dict(zip(names, by_block(layers, names)))
    pixels = samples * height * width
    state = UNet(unet, layers, forward, samples, pixels, text, options.checkpointing, blocks)
    x = state.conv("conv_in", given[0])
    skips = [x]
    for name in _names(unet, "down_blocks"):
        x = _down(state, name, x, skips)
    x = _middle(state, "mid_block", x)
    for name in _names(unet, "up_blocks"):
        x = _up(state, name, x, skips)
    x = forward.activation(forward.group_norm(x, samples * unet.conv_norm_out.num_groups))
    x = state.conv("conv_out", x)
    tape.reach_loss()
    del state
    return squared_error(forward, x)


def _names(unet: Any, stage: str) -> list[str]:
    return [f"{stage}.{index}" for index in range(len(getattr(unet, stage)))]


def _parts(block: Any) -> list[nn.Module]:
    kinds = ("resnets", "attentions", "downsamplers", "upsamplers")
    return [module for kind in kinds for module in getattr(block, kind, None) or []]


def _attended(state: UNet, name: str, x: Sized, index: int) -> Sized:
    """The transformer behind a resnet, if there is one."""
    if hasattr(state.model.get_submodule(name), "attentions"):
        x = state.run(f"{name}.attentions.{index}", x)
    return x


def _down(state: UNet, name: str, x: Sized, skips: list[Sized]) -> Sized:
    block = state.model.get_submodule(name)
    for index in range(len(block.resnets)):
        x = state.once_or_twice(partial(state.run, f"{name}.resnets.{index}"), x)
        x = _attended(state, name, x, index)
        skips.append(x)
    for index in range(len(block.downsamplers or [])):
        x = state.run(f"{name}.downsamplers.{index}", x)
        skips.append(x)
    return x


def _middle(state: UNet, name: str, x: Sized) -> Sized:
    block = state.model.get_submodule(name)
    x = state.run(f"{name}.resnets.0", x)
    for index in range(len(block.attentions)):
        x = state.run(f"{name}.attentions.{index}", x)
        x = state.once_or_twice(partial(state.run, f"{name}.resnets.{index + 1}"), x)
    return x


def _up(state: UNet, name: str, x: Sized, skips: list[Sized]) -> Sized:
    block = state.model.get_submodule(name)
    held = skips[-len(block.resnets) :]
    del skips[-len(block.resnets) :]
    for index in range(len(block.resnets)):
        x = state.forward.cat(x, held[-1 - index])
        x = state.once_or_twice(partial(state.run, f"{name}.resnets.{index}"), x)
        x = _attended(state, name, x, index)
    for index in range(len(block.upsamplers or [])):
        x = state.run(f"{name}.upsamplers.{index}", x)
    return x


def _resnet(state: UNet, name: str, module: Any, x: Sized) -> Sized:
    """`shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time)))`."""
    forward = state.forward
    groups = state.samples * module.norm1.num_groups
    h = forward.activation(forward.group_norm(x, groups))
    h = state.conv(f"{name}.conv1", h)
    h = _plus(forward, h)  # the timestep's embedding
    h = forward.activation(forward.group_norm(h, groups))
    h = state.conv(f"{name}.conv2", h)
    if module.conv_shortcut is not None:
        x = state.conv(f"{name}.conv_shortcut", x)
    return forward.new(forward.add(x, h))  # / output_scale_factor


def _plus(forward: Forward, x: Sized) -> Sized:
    out = forward.tape.new(x.numel, x.itemsize)
    return forward.tape.operation([x], out, passes=True)


def _transformer(state: UNet, name: str, module: Any, x: Sized) -> Sized:
    forward, residual = state.forward, x
    linear = module.use_linear_projection
    x = forward.group_norm(x, state.samples * module.norm.num_groups)
    into, out = state.layers[f"{name}.proj_in"], state.layers[f"{name}.proj_out"]
    x = forward.new(x) if linear else x
    state.reach(f"{name}.proj_in")
    x = x if linear else forward.conv(x, into, state.pixels)
    x = forward.linear(x, into) if linear else forward.new(x)  # pixels become rows: a copy
    for index in range(len(module.transformer_blocks)):
        block = f"{name}.transformer_blocks.{index}"
        run = partial(_block, state, state.blocks[block], state.model.get_submodule(block))
        state.reach(block)
        x = state.once_or_twice(run, x)
    tokens = x  # diffusers makes the output in a method whose caller holds them
    x = x if linear else forward.new(x)
    state.reach(f"{name}.proj_out")
    x = forward.linear(x, out) if linear else forward.conv(x, out, state.pixels)
    x = forward.new(x) if linear else x
    x = forward.add(x, residual)
    del tokens
    return x


def _block(state: UNet, layers: Mapping[str, Layer], module: Any, x: Sized) -> Sized:
    """Attention to the picture, attention to the prompt, gated feed-forward."""
    forward, width = state.forward, layers["attn1.to_q"].d_in
    normed = forward.layer_norm(x, width)
    attended = _attention(forward, layers, "attn1", module.attn1.heads, normed, normed)
    x = forward.add(attended, x)
    normed = forward.layer_norm(x, width)
    attended = _attention(forward, layers, "attn2", module.attn2.heads, normed, state.text)
    x = forward.add(attended, x)
    normed = forward.layer_norm(x, width)
    out = forward.linear(_gated(forward, layers, normed), layers["ff.net.2"])
    return forward.add(out, x)


def _gated(forward: Forward, layers: Mapping[str, Layer], x: Sized) -> Sized:
    """GEGLU: `a · gelu(b)` of two halves."""
    both = forward.linear(x, layers["ff.net.0.proj"])
    a, b = forward.split(both, [both.numel // 2] * 2)
    return forward.mul(a, forward.activation(b))


def _attention(
    forward: Forward, layers: Mapping[str, Layer], name: str, heads: int, x: Sized, other: Sized
) -> Sized:
    if other is x:
        read = forward.reading(x, *(layers[f"{name}.to_{part}"] for part in "qkv"))
    else:
        keys = [layers[f"{name}.to_{part}"] for part in "kv"]
        read = [*forward.reading(x, layers[f"{name}.to_q"]), *forward.reading(other, *keys)]
    q, k, v = read[0](), read[1](), read[2]()
    out = forward.attention(q, k, v, layers[f"{name}.to_q"].d_out // heads)
    out = forward.linear(out, layers[f"{name}.to_out.0"])
    return forward.new(out)  # / rescale_output_factor


def _downsample(state: UNet, name: str, module: Any, x: Sized) -> Sized:
    state.pixels //= 4
    return state.conv(f"{name}.conv", x)


def _upsample(state: UNet, name: str, module: Any, x: Sized) -> Sized:
    state.pixels *= 4
    x = state.forward.new(x, numel=4 * x.numel)
    return state.conv(f"{name}.conv", x)


FORWARDS: Mapping[str, Any] = {
    "ResnetBlock2D": _resnet,
    "Transformer2DModel": _transformer,
    "Downsample2D": _downsample,
    "Upsample2D": _upsample,
}
