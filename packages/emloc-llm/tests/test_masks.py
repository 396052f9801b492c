"""What is folded, counted layer by layer on padded micro-batches; blocks and weights that are shared."""

import pytest
import tiny_models
import torch
from tiny_models import write_tiny
from transformers import AlbertConfig, AlbertForMaskedLM, AutoModelForCausalLM, AutoModelForMaskedLM

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.compression.emulator_folder import EmulatorFolder
from emloc.compression.fitting import compress_blocks
from emloc.compression.groups import CompressionPlan, Group
from emloc.config import CompressConfig
from emloc.errors import ConfigError, NumericalError
from emloc.extend.plugin_options import with_plugin_options
from emloc.formats.layer_format import GroupShape
from emloc.formats.low_rank import low_rank
from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
from emloc.integrations.transformers.skeleton import empty_model, shared_linears
from emloc.streaming.stream import UnitStream
from emloc_llm.example import write_rows
from emloc_llm.family import LLMFamily


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def counted(model, batches, layers):
    """Rows of real tokens that each layer reads when samples go one by one, without padding."""
    seen = dict.fromkeys(layers, 0)

    def count(name):
        def hook(_, inputs):
            x = inputs[0]
            if x.shape[-2] > 1 or bool(x.any()):  # Zaya's state before the first token is nothing
                seen[name] += x.numel() // x.shape[-1]

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(count(name)) for name in layers]
    with torch.no_grad():
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool()):
                model(
                    input_ids=ids[mask][None],
                    attention_mask=mask[mask][None].long(),
                    use_cache=False,
                )
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "kind", ["llama", "mixtral", "qwen2_moe", "deepseek_v3", "gemma3n_text", "xlnet", "cpmant",
             "prophetnet", "zaya", "xlm"]
)  # fmt: skip
def test_real_tokens_are_folded_and_no_others(kind, tmp_path):
    write_tiny(tmp_path / "base", kind)
    data = write_rows(tmp_path / "train.jsonl", 6, seed=1)
    options = {"dataset": str(data), "max_length": 64, "calibration_batch_size": 3}
    folder = emloc.compress(
        model_name_or_path=str(tmp_path / "base"), output_dir=tmp_path / "e", format="low_rank",
        keep_ratio=0.7, share_factors=False, **options,
    )  # fmt: skip
    config = with_plugin_options(CompressConfig)(
        model_name_or_path=str(tmp_path / "base"), output_dir=tmp_path / "x", **options
    )
    batches = LLMFamily().calibration_batches(Checkpoint.open(tmp_path / "base"), config)
    found = {name: e["tokens"] for name, e in Manifest.read(folder).layers.items()}
    assert found == counted(load(tmp_path / "base"), batches, found)


class MaskedLM(LLMFamily):
    """A family of another package, for models that see both sides."""

    def skeleton(self, checkpoint, dtype):
        return empty_model(checkpoint, AutoModelForMaskedLM, dtype)

    def loss(self, model, batch):
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return output.logits.sum(), 1


@pytest.mark.parametrize(("groups", "layers"), [(1, 3), (2, 4)])
def test_albert_runs_its_blocks_again_and_all_runs_count(tmp_path, groups, layers):
    tokenizer = byte_tokenizer()
    config = AlbertConfig(
        vocab_size=len(tokenizer), embedding_size=16, hidden_size=24, num_hidden_layers=layers,
        num_hidden_groups=groups, num_attention_heads=2, intermediate_size=40, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AlbertForMaskedLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    checkpoint, family = Checkpoint.open(tmp_path / "base"), MaskedLM()
    stream = UnitStream(family, checkpoint)
    assert len(stream.blocks) == groups
    options = with_plugin_options(CompressConfig)(
        model_name_or_path=str(tmp_path / "base"), output_dir=tmp_path / "e",
        dataset=str(write_rows(tmp_path / "train.jsonl", 6, seed=1)),
    )  # fmt: skip
    (tmp_path / "work").mkdir()
    folder = EmulatorFolder(stream, _plan(stream), "auto", tmp_path / "work")
    batches = family.calibration_batches(checkpoint, options)
    compress_blocks(stream, folder, batches)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert any(not batch["attention_mask"].all() for batch in batches)
    for block in stream.blocks:
        entries = folder.read_report(block)["layers"].values()
        assert {entry["tokens"] for entry in entries} == {real * layers // groups}


def _plan(stream):
    names = [name for group in stream.family.layer_groups(stream.model) for name in group]
    shapes = {name: stream.layer_shape(name) for name in names}
    groups = [
        Group(GroupShape((name,), (d_out,), d_in), low_rank(2))
        for name, (d_out, d_in) in shapes.items()
    ]
    return CompressionPlan(tuple(groups), {})


def test_layers_that_share_a_weight_stay_dense(tmp_path, monkeypatch):
    """Zamba 2 has one transformer between its Mamba blocks, again and again."""
    several = {"num_hidden_layers": 5, "num_mem_blocks": 1,
               "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid"]}  # fmt: skip
    monkeypatch.setitem(tiny_models.OVERRIDES, "zamba2", several)
    write_tiny(tmp_path / "base", "zamba2")
    data = write_rows(tmp_path / "train.jsonl", 6, seed=1)
    folder = emloc.compress(
        model_name_or_path=str(tmp_path / "base"), dataset=str(data), output_dir=tmp_path / "e",
        format="low_rank", rank_pattern={".*": 10_000}, max_length=64,
    )  # fmt: skip
    manifest = Manifest.read(folder)
    shared = [name for name in manifest.kept_dense if "shared_transformer" in name]
    assert {manifest.kept_dense[name] for name in shared} == {"layers share its weight"}
    assert not any("shared_transformer" in name for name in manifest.layers)
    ids = torch.randint(3, 200, (2, 16))
    with torch.no_grad():
        expected, found = load(tmp_path / "base")(ids).logits, load(folder)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="share one weight"):
        emloc.compress(
            model_name_or_path=str(tmp_path / "base"), dataset=str(data), max_length=64,
            output_dir=tmp_path / "e2", include=[r".*shared_transformer\.self_attn\.q_proj"],
        )  # fmt: skip


def test_one_module_under_two_names_is_shared():
    block = torch.nn.Module()
    block.one = torch.nn.Linear(3, 4)
    block.other, block.own = block.one, torch.nn.Linear(3, 4)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([block])
    assert list(shared_linears(model, ["layers.0"])) == ["layers.0.one"]


def test_a_model_that_computes_nan_has_no_score(tiny, tmp_path):
    model = load(tiny.base)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(NumericalError, match="the loss is nan"):
        emloc.evaluate(
            model_name_or_path=str(tmp_path / "base"), dataset=str(tiny.test),
            output_dir=tmp_path / "scores",
        )  # fmt: skip
    assert not (tmp_path / "scores" / "evaluation.json").exists()


def test_training_that_ends_in_nan_leaves_nothing(tiny, tmp_path):
    """With one step, its loss is that of the weights before it."""
    with pytest.raises(NumericalError, match=r"Training ended with NaN or infinity in .*lora"):
        emloc.train(
            model_name_or_path=str(tiny.base), dataset=str(tiny.data), max_steps=1,
            output_dir=tmp_path / "a", learning_rate=1e300, warmup_ratio=0, lora_r=2,
        )  # fmt: skip
    assert not (tmp_path / "a").exists()
