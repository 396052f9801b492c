"""A LoRA that begins as EVA does reads the directions in which real rows vary most, in every family."""

import copy

import pytest
import torch
from own_families import encoders, installed
from safetensors.torch import load_file

import emloc
from emloc.artefacts.locate import locate
from emloc.config import CompressConfig, TrainConfig, build
from emloc.errors import ConfigError
from emloc.extend.capabilities import example_of
from emloc.extend.opening import open_model
from emloc.extend.plugin_options import of_family, with_plugin_options
from emloc.extend.plugins import family_named
from emloc.integrations.peft import eva
from emloc.integrations.peft.lora import new_lora

RANK = 4


@pytest.fixture(params=["llm", "vlm", "diffusion", "classifier", "text-to-text"])
def name(request):
    with installed(request.param):
        yield request.param


def opened(name, folder, **more):
    """The family's example: the model, options for training, and its samples as one batch."""
    example = example_of(family_named(name), folder)
    base, family = open_model(locate(example["model_name_or_path"]), family=name)
    model = family.load(base, "float32", "cpu")
    kind = with_plugin_options(CompressConfig)
    given = {
        **example,
        "output_dir": folder / "x",
        "num_calibration_samples": 24,
        "calibration_batch_size": 24,
    }
    batches = family.calibration_batches(base, of_family(build(kind, given, "compress"), family))
    asked = {**example, "output_dir": folder / "y", "lora_init": "eva", "lora_r": RANK, **more}
    config = of_family(build(with_plugin_options(TrainConfig), asked, "train"), family)
    if name == "diffusion":  # whose own training names the layers of the denoiser
        targets = ["to_q", "to_k", "to_v", "ff.net.2"]
        config = config.model_copy(update={"lora_target_modules": targets})
    return family, model, config, batches


def variance(family, model, batches):
    """Covariance (float64) of what linear layers read, by hand: no padding, no token without a label."""
    rows, handles = {}, []

    def on(layer):
        def hook(_, given):
            values = given[0].detach()
            mask = torch.ones(values.shape[:-1], dtype=torch.bool)
            if "attention_mask" in batch and batch["attention_mask"].shape == mask.shape:
                mask &= batch["attention_mask"].bool()
            if "labels" in batch and batch["labels"].shape == mask.shape:
                mask &= batch["labels"] != -100
            rows.setdefault(layer, []).append(values[mask].double())

        return hook

    for layer, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(on(layer)))
    with torch.no_grad():
        for batch in batches:
            family.loss(model, batch)
    for handle in handles:
        handle.remove()
    return {layer: torch.cov(torch.cat(parts).T) for layer, parts in rows.items()}


def test_it_reads_where_real_rows_vary_most(name, tmp_path):
    family, model, config, batches = opened(name, tmp_path)
    task = getattr(family, "task_type", None)
    expected = variance(family, model.eval(), batches)
    lora, start = new_lora(model, config, batches, task_type=task, family=family)
    assert start == {}
    checked, ranks = 0, []
    for layer, module in lora.named_modules():
        down = getattr(module, "lora_A", {})
        layer = layer.removeprefix("base_model.model.")
        if "default" not in down or layer not in expected:
            continue
        read, cov = down["default"].weight.detach().double(), expected[layer]
        ranks.append(len(read))
        torch.testing.assert_close(read @ read.T, torch.eye(len(read)).double(), rtol=0, atol=1e-4)
        most = torch.linalg.eigvalsh(cov)[-len(read) :].sum()
        assert torch.trace(read @ cov @ read.T) >= 0.97 * most, layer
        checked += 1
    assert checked > 5
    assert sum(ranks) <= RANK * (checked + 2)  # a layer of rank 0 is adapted no more
    assert max(ranks) <= 2 * RANK


def test_training_begins_with_it(name, tmp_path):
    example = example_of(family_named(name), tmp_path)
    options = {"max_steps": 1, "lora_r": 3, "learning_rate": 1e-9, "lora_init": "eva"}
    folder = emloc.train(**example, **options, output_dir=tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    down = [tensor for key, tensor in tensors.items() if "lora_A" in key and tensor.ndim == 2]
    assert len({len(tensor) for tensor in down}) > 1 or len(down) < 3
    for tensor in down:
        torch.testing.assert_close(tensor.norm(dim=1), torch.ones(len(tensor)), rtol=0, atol=1e-4)


def test_more_ranks_than_a_layer_reads_are_refused(tmp_path):
    family, model, config, batches = opened("llm", tmp_path, lora_r=60)
    with pytest.raises(
        ConfigError, match=r"cannot find 60 directions in the \d+ numbers that model\.layers"
    ):
        new_lora(model, config, batches, family=family)


def test_convolutions_are_refused_by_name(tmp_path):
    family, model, config, batches = opened("diffusion", tmp_path)
    config = config.model_copy(update={"lora_target_modules": ["to_q", "conv1"]})
    with pytest.raises(ConfigError, match=r"works on linear layers, but .*conv1 is a Conv2d"):
        new_lora(model, config, batches, family=family)


def test_ranks_of_narrow_layers_grow_as_far_as_they_can(tmp_path):
    family, model, config, batches = opened("llm", tmp_path, lora_r=30)
    lora, _ = new_lora(model, config, batches, family=family, task_type="CAUSAL_LM")
    shapes = [
        tuple(module.lora_A["default"].weight.shape)
        for module in lora.modules()
        if "default" in getattr(module, "lora_A", {})
    ]
    assert any(rank != 30 for rank, _ in shapes)
    assert all(rank <= width for rank, width in shapes)


def test_a_layer_that_reads_nothing_is_named(tmp_path):
    family, model, config, batches = opened("llm", tmp_path)
    idle = next(
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers.1" in n
    )
    model.get_submodule(idle.rpartition(".")[0]).__class__ = _without(model, idle)
    with pytest.raises(
        ConfigError, match=f"1 of them, the first {idle}, read nothing of the first samples"
    ):
        new_lora(model, config, batches, family=family)


def _without(model, idle):
    """The class of a layer's parent, whose forward takes the layer's weight and passes the layer by."""
    parent, child = idle.rsplit(".", 1)
    module = model.get_submodule(parent)
    kind, layer = type(module), model.get_submodule(idle)

    class Passing(kind):
        def forward(self, *args, **kwargs):
            kept = self._modules[child]
            self._modules[child] = lambda x: torch.nn.functional.linear(x, layer.weight, layer.bias)
            try:
                return super().forward(*args, **kwargs)
            finally:
                self._modules[child] = kept

    return Passing


def test_rows_that_may_be_padding_are_refused(tmp_path):
    """DeBERTa's queries are asked of tokens and of distances."""
    with encoders():
        from emloc_encoder.example import write_example

        example = write_example(tmp_path, 0, "deberta-v2")
        sentence = "which rows of what deberta.encoder.layer.0.attention.self"
        with pytest.raises(ConfigError, match=sentence):
            emloc.train(**example, output_dir=tmp_path / "a", lora_init="eva", lora_r=3)
    assert not (tmp_path / "a").exists()


class Experts(torch.nn.Module):
    """Two MLPs, each of which reads tokens of its own, in an order of its own, padding among them."""

    def __init__(self, mlp):
        super().__init__()
        self.experts = torch.nn.ModuleList([mlp, copy.deepcopy(mlp)])

    def forward(self, states):
        rows = states.reshape(-1, states.shape[-1])
        chosen = torch.arange(len(rows)).flip(0) % 3 > 0
        out = torch.zeros_like(rows)
        for expert, which in zip(self.experts, (chosen, ~chosen)):
            out[which] = expert(rows[which])
        return out.reshape(states.shape)


def test_experts_read_what_chose_them(tmp_path):
    family, model, config, batches = opened("llm", tmp_path)
    block = model.model.layers[1]
    block.mlp = Experts(block.mlp)
    read = []
    second = block.mlp.experts[1].up_proj
    handle = second.register_forward_pre_hook(lambda _, given: read.append(given[0].double()))
    with torch.no_grad():
        family.loss(model.eval(), batches[0])
    handle.remove()
    lora, _ = new_lora(model, config, batches, task_type="CAUSAL_LM", family=family)
    down = lora.get_submodule("base_model.model.model.layers.1.mlp.experts.1.up_proj").lora_A
    found, cov = down["default"].weight.detach().double(), torch.cov(read[0].T)
    most = torch.linalg.eigvalsh(cov)[-len(found) :].sum()
    assert torch.trace(found @ cov @ found.T) >= 0.97 * most


def test_directions_that_do_not_settle_are_given_up(tmp_path, monkeypatch):
    family, model, config, batches = opened("llm", tmp_path)
    monkeypatch.setattr(eva, "MOST_PASSES", 1)
    with pytest.raises(ConfigError, match="found no directions that settle in 1 passes"):
        new_lora(model, config, batches, family=family)


def test_samples_that_come_one_by_one_are_none_to_look_at(tmp_path):
    example = example_of(family_named("llm"), tmp_path)
    with pytest.raises(
        ConfigError, match="looks at samples before the first step, but here there are none"
    ):
        emloc.train(
            **example, output_dir=tmp_path / "a", lora_init="eva", streaming=True, max_steps=1,
            num_held_back_samples=0,
        )  # fmt: skip
    assert not (tmp_path / "a").exists()


def test_a_head_that_reads_a_row_for_each_sample_is_no_endless_wait(tmp_path):
    """Rows of several batches are put together, where one has fewer than directions are looked for."""
    with installed("classifier"):
        family, model, config, batches = opened("classifier", tmp_path, lora_r=3)
        heads = [
            n
            for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and "layer." not in n
        ]
        assert heads
        config = config.model_copy(update={"lora_target_modules": heads})
        few = [{key: value[:2] for key, value in batch.items()} for batch in batches]
        lora, _ = new_lora(model, config, few, family=family)
    for module in lora.modules():
        if "default" in getattr(module, "lora_A", {}):
            read = module.lora_A["default"].weight.detach()
            torch.testing.assert_close(read.norm(dim=1), torch.ones(len(read)), rtol=0, atol=1e-4)
