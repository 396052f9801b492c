"""Pipelines written as one file in the original layouts: the inverse of what diffusers reads.

Names are those of Stability AI's programs. `sd`: CompVis' UNet and VAE, CLIP of transformers; `sdxl`: the
same and OpenCLIP with fused projections; `sd3`: joint blocks with fused projections.
"""

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def unet_names(unet):
    """Module prefixes, diffusers' and the original's."""
    config = unet.config
    levels, layers = len(config.block_out_channels), config.layers_per_block
    names, number = {}, 1
    for level in range(levels):
        for layer in range(layers):
            names[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if level < levels - 1:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    names["mid_block.resnets.0"] = "middle_block.0"
    names["mid_block.attentions.0"] = "middle_block.1"
    names["mid_block.resnets.1"] = "middle_block.2"
    number = 0
    for level in range(levels):
        attends = "CrossAttn" in config.up_block_types[level]
        for layer in range(layers + 1):
            names[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            names[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        place = 2 if attends else 1
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{place}.conv"
    return names


def unet_tensors(unet):
    names, found = {**UNET_ENDS, **unet_names(unet)}, {}
    for key, tensor in unet.state_dict().items():
        start = next(name for name in names if key.startswith(f"{name}."))
        rest = key.removeprefix(start)
        if "resnets" in start:
            _, part, leaf = rest.split(".")
            rest = f".{RESNET[part]}.{leaf}"
        found[f"model.diffusion_model.{names[start]}{rest}"] = tensor
    return found


def vae_tensors(vae, prefix="first_stage_model."):
    found, ups = {}, len(vae.config.up_block_types)
    for key, tensor in vae.state_dict().items():
        parts = key.split(".")
        if "up_blocks" in parts:
            parts[1:3] = ["up", str(ups - 1 - int(parts[2]))]
        name = (
            ".".join(parts)
            .replace("down_blocks", "down").replace(".resnets.", ".block.")
            .replace("mid_block.block.0", "mid.block_1").replace("mid_block.block.1", "mid.block_2")
            .replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            .replace("to_out.0", "proj_out").replace("conv_norm_out", "norm_out")
            .replace("conv_shortcut", "nin_shortcut").replace("downsamplers.0", "downsample")
            .replace("upsamplers.0", "upsample")
        )  # fmt: skip
        for letter in "qkv":
            name = name.replace(f"to_{letter}", letter)
        if "attn_1" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        found[prefix + name] = tensor
    return found


def clip_tensors(encoder, prefix):
    """As transformers names them, under `text_model`."""
    found = {}
    for key, tensor in encoder.state_dict().items():
        whole = key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}"
        found[prefix + whole] = tensor
    return found


def open_clip_tensors(encoder, prefix):
    """OpenCLIP's: q, k and v in one, the projection transposed."""
    tensors, found = encoder.state_dict(), {}
    text = "text_model."
    found["positional_embedding"] = tensors[f"{text}embeddings.position_embedding.weight"]
    found["token_embedding.weight"] = tensors[f"{text}embeddings.token_embedding.weight"]
    found["text_projection"] = tensors["text_projection.weight"].T
    for leaf in ("weight", "bias"):
        found[f"ln_final.{leaf}"] = tensors[f"{text}final_layer_norm.{leaf}"]
        for layer in range(encoder.config.num_hidden_layers):
            ours, theirs = f"{text}encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
            found[f"{theirs}attn.in_proj_{leaf}"] = torch.cat(
                [tensors[f"{ours}self_attn.{letter}_proj.{leaf}"] for letter in "qkv"]
            )
            for name, original in (
                ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                found[f"{theirs}{original}.{leaf}"] = tensors[f"{ours}{name}.{leaf}"]
    return {prefix + name: tensor for name, tensor in found.items()}


def swapped(tensor):
    """Scale and shift the other way round."""
    return torch.cat(tensor.chunk(2)[::-1])


def sd3_tensors(transformer):
    """Of blocks without a norm of queries and keys, and without a second attention."""
    tensors, found = transformer.state_dict(), {}
    found["pos_embed"] = tensors["pos_embed.pos_embed"]
    last = transformer.config.num_layers - 1
    for leaf in ("weight", "bias"):
        for name, original in (
            ("pos_embed.proj", "x_embedder.proj"), ("context_embedder", "context_embedder"),
            ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
            ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
            ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
            ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
            ("proj_out", "final_layer.linear"),
        ):  # fmt: skip
            found[f"{original}.{leaf}"] = tensors[f"{name}.{leaf}"]
        found[f"final_layer.adaLN_modulation.1.{leaf}"] = swapped(
            tensors[f"norm_out.linear.{leaf}"]
        )
        for block in range(last + 1):
            ours, theirs = f"transformer_blocks.{block}.", f"joint_blocks.{block}."
            kinds = {
                "x_block": ("attn.to_{}", "attn.to_out.0", "norm1.linear", "ff"),
                "context_block": (
                    "attn.add_{}_proj", "attn.to_add_out", "norm1_context.linear", "ff_context",
                ),
            }  # fmt: skip
            for kind, (read, out, norm, feed) in kinds.items():
                inner = f"{theirs}{kind}."
                found[f"{inner}attn.qkv.{leaf}"] = torch.cat(
                    [tensors[f"{ours}{read.format(letter)}.{leaf}"] for letter in "qkv"]
                )
                modulation = tensors[f"{ours}{norm}.{leaf}"]
                ends = kind == "context_block" and block == last
                found[f"{inner}adaLN_modulation.1.{leaf}"] = (
                    swapped(modulation) if ends else modulation
                )
                if ends:
                    continue
                found[f"{inner}attn.proj.{leaf}"] = tensors[f"{ours}{out}.{leaf}"]
                found[f"{inner}mlp.fc1.{leaf}"] = tensors[f"{ours}{feed}.net.0.proj.{leaf}"]
                found[f"{inner}mlp.fc2.{leaf}"] = tensors[f"{ours}{feed}.net.2.{leaf}"]
    return {f"model.diffusion_model.{name}": tensor for name, tensor in found.items()}


def write_original(pipeline, kind, path, without=()):
    """The pipeline as one file; `without` leaves parts out."""
    tensors = {}
    if kind == "sd3":
        prefix, parts = "text_encoders.", pipeline.components
        tensors |= sd3_tensors(pipeline.transformer)
        if "vae" not in without:
            tensors |= vae_tensors(pipeline.vae)
        tensors |= clip_tensors(parts["text_encoder"], f"{prefix}clip_l.transformer.")
        tensors |= clip_tensors(parts["text_encoder_2"], f"{prefix}clip_g.transformer.")
        tensors |= {
            f"{prefix}t5xxl.transformer.{key}": tensor
            for key, tensor in parts["text_encoder_3"].state_dict().items()
        }
    else:
        tensors |= unet_tensors(pipeline.unet)
        if "vae" not in without:
            tensors |= vae_tensors(pipeline.vae)
        if "text_encoder" not in without:
            start = "cond_stage_model." if kind == "sd" else "conditioner.embedders.0."
            tensors |= clip_tensors(pipeline.text_encoder, f"{start}transformer.")
        if kind == "sdxl":
            tensors |= open_clip_tensors(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
        # Files keep the trainer's schedule, and its copy of averaged weights.
        tensors["alphas_cumprod"] = torch.linspace(1, 0, 1000)
        tensors["model_ema.decay"] = torch.tensor(0.9999)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path
