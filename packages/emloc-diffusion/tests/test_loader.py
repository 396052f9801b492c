"""Emulators in the hands of diffusers: `from_pretrained`, pipelines, `save_pretrained`, LoRA."""

import copy
import json
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from emloc.errors import CheckpointError, ConfigError, MismatchError
from emloc.extend.emulated_layers import METHOD
from emloc.extend.family import EmulatorLayers
from emloc.integrations.diffusers.quantizer import (
    EmlocConfig,
    emulator_config,
    replace_layers,
)
from emloc.layers.low_rank_conv import LowRankConv2d
from emloc.layers.low_rank_linear import LowRankLinear
from emloc_diffusion.example_pipelines import write_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMPONENTS = {"sd": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}
LORA = {
    "sd": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv_shortcut", "conv"],
    "flux": ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "proj_mlp", "norm1.linear"],
}


def model_class(folder):
    return getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])


def load(folder, dtype=torch.float64, **options):
    model = model_class(folder).from_pretrained(folder, torch_dtype=dtype, **options)
    return model[0].eval() if isinstance(model, tuple) else model.eval()


def layer_groups(model):
    """Every linear and convolution, the projections of one input together."""
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    groups = {}
    for name in names:
        parent, _, kind = name.rpartition(".")
        joint = ("to_k", "to_v") if ".attn2" in parent else ("to_q", "to_k", "to_v")
        groups.setdefault((parent, "input") if kind in joint else name, []).append(name)
    return list(groups.values())


def write_emulator(base, folder, component, share):
    """A copy of a pipeline, one component of which is factors of `share` of the full rank, in float64.

    Returns the dense component of the same products.
    """
    shutil.copytree(base, folder)
    target = folder / component
    dense = load(target)
    tensors = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    groups = []
    for names in layer_groups(dense):
        layers = [dense.get_submodule(name) for name in names]
        stacked = torch.cat([layer.weight.detach().flatten(1) for layer in layers])
        rank = max(1, int(share * min(stacked.shape)))
        u, s, vt = torch.linalg.svd(stacked, full_matrices=False)
        lefts = (u[:, :rank] * s[:rank]).split([len(layer.weight) for layer in layers])
        right = vt[:rank]
        for name, layer, left in zip(names, layers, lefts):
            del tensors[f"{name}.weight"]
            with torch.no_grad():
                layer.weight.copy_((left @ right).view(layer.weight.shape))
            four = isinstance(layer, nn.Conv2d)
            tensors[f"{name}.left"] = (left[..., None, None] if four else left).contiguous()
        shape = (rank, *layers[0].weight.shape[1:])
        tensors[f"{names[0]}.right"] = right.reshape(shape).contiguous()
        groups.append({"layers": names, "rank": rank})
    save_file(tensors, target / WEIGHTS)
    config = json.loads((target / "config.json").read_text())
    config = emulator_config(config, EmulatorLayers(groups, None))
    (target / "config.json").write_text(json.dumps(config))
    return dense


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By kind: a pipeline, emulators of it at full and half rank, and the dense model of the half."""
    root, done = tmp_path_factory.mktemp("loader"), {}

    def make(kind):
        if kind not in done:
            base = write_pipeline(root / kind, kind)
            component = COMPONENTS[kind]
            write_emulator(base, root / f"{kind}-full", component, 1)
            done[kind] = SimpleNamespace(
                base=base,
                component=base / component,
                full=root / f"{kind}-full" / component,
                pipeline=root / f"{kind}-half",
                dense=write_emulator(base, root / f"{kind}-half", component, 0.5),
                half=root / f"{kind}-half" / component,
            )
        return done[kind]

    return make


def output(model, seed=0):
    """The model's own forward on random inputs of its sizes."""
    generator = torch.Generator().manual_seed(seed)
    config, first = model.config, next(model.parameters())

    def draw(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(first.device, first.dtype)

    time = torch.tensor([3, 700], device=first.device)
    kind = type(model).__name__
    if kind == "UNet2DConditionModel":
        inputs = {
            "sample": draw(2, config.in_channels, 8, 8),
            "timestep": time,
            "encoder_hidden_states": draw(2, 5, config.cross_attention_dim),
        }
        if config.addition_embed_type:
            pooled = (
                config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            )
            inputs["added_cond_kwargs"] = {
                "text_embeds": draw(2, pooled), "time_ids": draw(2, 6)
            }  # fmt: skip
    else:
        inputs = {
            "encoder_hidden_states": draw(2, 5, config.joint_attention_dim),
            "pooled_projections": draw(2, config.pooled_projection_dim),
        }
        if kind == "SD3Transformer2DModel":
            inputs |= {"hidden_states": draw(2, config.in_channels, 8, 8), "timestep": time}
        else:
            ids = torch.arange(16)
            inputs |= {
                "hidden_states": draw(2, 16, config.in_channels),
                "timestep": time.to(first.dtype) / 1000,
                "guidance": draw(2),
                "img_ids": torch.stack([ids * 0, ids // 4, ids % 4], 1).to(first.dtype),
                "txt_ids": torch.zeros(5, 3, dtype=first.dtype),
            }
    return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("kind", sorted(COMPONENTS))
@torch.no_grad()
def test_factors_are_the_dense_model_of_their_products(made, kind):
    ours = load(made(kind).half)
    assert all(
        isinstance(ours.get_submodule(name), (LowRankLinear, LowRankConv2d))
        for name, module in made(kind).dense.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    )
    assert ours.num_parameters() < made(kind).dense.num_parameters()
    torch.testing.assert_close(output(ours), output(made(kind).dense))
    full, base = load(made(kind).full), load(made(kind).component)
    torch.testing.assert_close(output(full), output(base))
    assert (output(ours) - output(base)).abs().max() > 1e-3


def test_shared_factors_are_stored_once(made):
    names = set(load_file(made("sd").half / WEIGHTS))
    shared = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert {f"{shared}.to_{x}.left" for x in "qkv"} | {f"{shared}.to_q.right"} <= names
    assert f"{shared}.to_k.right" not in names
    model = load(made("sd").half)
    assert model.get_submodule(f"{shared}.to_v").shared.owner is model.get_submodule(
        f"{shared}.to_q"
    )


@pytest.mark.parametrize("kind", ["sd", "flux"])
@pytest.mark.parametrize("low_cpu_mem_usage", [None, True])
def test_every_key_is_used(made, kind, low_cpu_mem_usage):
    folder = made(kind).half
    model, info = model_class(folder).from_pretrained(
        folder, output_loading_info=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert not any(info.values()), info
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not model.training
    assert model.hf_quantizer.is_trainable


def test_subfolder_device_map_and_the_libraries_own_refusal(made):
    cls = model_class(made("sd").half)
    model = cls.from_pretrained(
        made("sd").pipeline, subfolder="unet", device_map="cpu", torch_dtype=torch.float64
    )
    with torch.no_grad():
        torch.testing.assert_close(output(model), output(made("sd").dense))
    # diffusers loads nothing that has a quantizer without it, and says so.
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        cls.from_pretrained(made("sd").half, low_cpu_mem_usage=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_dtypes_at_loading_and_by_casting(made, dtype):
    model = load(made("sd").half, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    cast = load(made("sd").half).to(dtype)  # as training scripts do
    for name, parameter in cast.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=0, atol=0)
    if dtype != torch.float16:  # some CPU kernels lack it
        error = (output(model).double() - output(made("sd").dense)).abs().max()
        assert error < (1e-4 if dtype == torch.float32 else 0.3)


@pytest.mark.parametrize("kind", ["sd", "flux"])
@pytest.mark.parametrize("shard", ["10GB", "40KB"])
@torch.no_grad()
def test_saving_writes_the_factors_back(made, kind, shard, tmp_path):
    model = load(made(kind).half)
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    files = sorted((tmp_path / "again").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "40KB")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    torch.testing.assert_close(tensors, load_file(made(kind).half / WEIGHTS), rtol=0, atol=0)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    before = json.loads((made(kind).half / "config.json").read_text())
    assert config["quantization_config"] == before["quantization_config"]
    # Mapped weights lie at other addresses in other files, and on some processors products round by that.
    torch.testing.assert_close(output(load(tmp_path / "again")), output(model))


def test_copies_and_what_is_printed(made):
    model = load(made("sd").half)
    with torch.no_grad():
        expected = output(copy.deepcopy(model).to(memory_format=torch.channels_last))
        torch.testing.assert_close(output(model), expected)
    assert "EmlocConfig" in repr(model.config)
    assert "rank=" in repr(model)
    assert METHOD in model.to_json_string()


@pytest.mark.parametrize("kind", ["sd", "flux"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_stock_lora_is_that_of_the_dense_model(made, kind, checkpointing):
    """Same keys, shapes and gradients as on the dense model of the same products."""
    found = []
    for model in (load(made(kind).half), copy.deepcopy(made(kind).dense)):
        model.requires_grad_(False)
        torch.manual_seed(0)
        model.add_adapter(
            LoraConfig(r=2, lora_alpha=4, target_modules=LORA[kind], init_lora_weights=False)
        )
        model.double().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        loss = output(model).square().mean()
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        shapes = {name: value.shape for name, value in get_peft_model_state_dict(model).items()}
        found.append((loss.detach(), gradients, shapes, model))
    ours, theirs = found
    assert ours[2] == theirs[2]
    assert any(len(shape) == 4 for shape in ours[2].values()) == (kind == "sd")
    assert set(ours[1]) == {name for name, p in ours[3].named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in ours[1])
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])


def test_a_trained_lora_serves_in_pipelines(made, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(
        made("sd").pipeline, torch_dtype=torch.float32
    )
    unet = pipeline.unet
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=LORA["sd"]))
    unet.train()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(6):
        loss = (output(unet) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.97
    unet.eval()
    # Under PEFT's own keys: diffusers' older ones hold no convolutions, and mixed files load by halves.
    layers = get_peft_model_state_dict(unet)
    options = unet.peft_config["default"].to_dict()  # alpha among them
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=options
    )
    for folder in (made("sd").pipeline, made("sd").base):
        fresh = DiffusionPipeline.from_pretrained(folder)
        with torch.no_grad():
            before = output(fresh.unet)
            fresh.load_lora_weights(tmp_path)
            after = output(fresh.unet)
            assert (after - before).abs().max() > 1e-3
            if folder == made("sd").pipeline:
                torch.testing.assert_close(after, output(unet))
    with pytest.raises(RuntimeError, match="cannot be written"):
        pipeline.fuse_lora()


def test_a_plain_pipeline_draws_and_saves(made, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(made("sd").pipeline)
    assert isinstance(pipeline.unet.conv_in, LowRankConv2d)
    pipeline.set_progress_bar_config(disable=True)

    def picture(drawn):
        generator = torch.Generator().manual_seed(0)
        return drawn("a", num_inference_steps=2, generator=generator, output_type="np").images

    first = picture(pipeline)
    pipeline.save_pretrained(tmp_path / "again")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    assert (picture(again) == first).all()
    dense = StableDiffusionPipeline.from_pretrained(
        made("sd").base, unet=copy.deepcopy(made("sd").dense).float()
    )
    dense.set_progress_bar_config(disable=True)
    torch.testing.assert_close(
        torch.from_numpy(picture(dense)), torch.from_numpy(first), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("factor", ["conv_in.left", "mid_block.resnets.0.conv1.right"])
def test_a_factor_that_is_missing_is_an_error(made, tmp_path, factor):
    shutil.copytree(made("sd").half, tmp_path / "unet")
    tensors = load_file(tmp_path / "unet" / WEIGHTS)
    del tensors[factor]
    save_file(tensors, tmp_path / "unet" / WEIGHTS)
    with pytest.raises(CheckpointError, match=factor):
        load(tmp_path / "unet")


def test_a_rank_that_does_not_fit_is_an_error(made, tmp_path):
    shutil.copytree(made("sd").half, tmp_path / "unet")
    path = tmp_path / "unet" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["groups"][0]["rank"] += 1
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected shape"):
        load(tmp_path / "unet")


def test_a_dense_model_is_not_compressed_by_loading(made):
    with pytest.raises(ValueError, match="pre-quantized"):
        model_class(made("sd").component).from_pretrained(
            made("sd").component, quantization_config=EmlocConfig([])
        )


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.conv = nn.Conv2d(3, 5, 3)
        self.same_conv = self.conv
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.norm = nn.LayerNorm(4)


@pytest.mark.parametrize(
    ("groups", "error", "says"),
    [
        ([["nowhere"]], MismatchError, "names nowhere"),
        ([["norm"]], MismatchError, "names norm"),
        ([["linear.weight"]], MismatchError, "names linear.weight"),
        ([["linear"], ["linear"]], MismatchError, "linear twice"),
        ([["linear", "linear"]], MismatchError, "linear twice"),
        ([["linear", "conv"]], MismatchError, "only linear layers"),
        ([["grouped"]], ConfigError, "2 groups"),
    ],
)
def test_configs_that_fit_no_model(groups, error, says):
    with pytest.raises(error, match=says):
        replace_layers(Parts(), [{"layers": names, "rank": 2} for names in groups])


def test_a_layer_of_two_names_is_replaced_under_both():
    class OwnLinear(nn.Linear):
        """As libraries have them."""

    model = Parts()
    model.linear = OwnLinear(4, 6, bias=False, dtype=torch.float16)
    replace_layers(model, [{"layers": ["conv"], "rank": 2}, {"layers": ["linear"], "rank": 3}])
    assert model.conv is model.same_conv
    assert isinstance(model.conv, LowRankConv2d)
    assert isinstance(model.linear, LowRankLinear)
    assert model.linear.bias is None
    assert model.linear.right.shape == (3, 4)
    assert model.linear.left.dtype == torch.float16
