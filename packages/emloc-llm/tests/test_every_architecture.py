"""The whole round trip on a tiny random model of every causal LM that transformers knows.

Full rank gives the base back; half the parameters load and train a step; the correction is exact on
what the LoRA reads; the merged model is stock PEFT's. What is refused, and why, is listed here.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import MODEL_TYPES, write_tiny
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.errors import ConfigError
from emloc.integrations.peft.targets import linear_targets
from emloc_llm.example import write_rows

MULTIMODAL = "a model of several modalities: not for the LLM plugin"
NO_CONFIG = "its default configuration cannot be shrunk to a valid tiny model by field names"
REFUSED = {
    **dict.fromkeys(
        ("emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2", "llama4",
         "mllama", "moss_transcribe_diarize", "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
         "musicgen", "musicgen_melody", "dots3_note"), MULTIMODAL,
    ),
    **dict.fromkeys(("cohere_compass_text", "zamba"), NO_CONFIG),
    "blt": "a byte model of four transformers, one of which cuts the input into patches",
    "gemma4_assistant": "a drafting head that reads another model's cache",
    "gemma4_unified_assistant": "a drafting head that reads another model's cache",
    "hrm_text": "its checkpoints hold fused projections, of whose parts a LoRA cannot be merged",
    "laguna": "PEFT garbles the names of its shared experts when it loads an adapter",
    "rwkv": "it rescales weights in place when it is evaluated, which products of factors cannot bear",
    "reformer": "its forward builds tensors on the device of its parameters, which are not there",
}  # fmt: skip
SUPPORTED = [model_type for model_type in MODEL_TYPES if model_type not in REFUSED]
NAMED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "phi3",
    "gpt_neox",
    "gpt2",
    "opt",
    "mixtral",
]


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    """Two threads only wait for one another on models this small, and nobody measures memory here."""
    monkeypatch.setattr("emloc.machine.memory.release_free_memory", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def dense_weight(model, name):
    module = model.get_submodule(name)
    return (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().double()


def train_a_step(emulator, folder, batch):
    """Stock PEFT's LoRA; B random afterwards, as one step leaves it near zero."""
    model = load(emulator)
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=linear_targets(model), task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config).train()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def worst_correction(base, emulator, adapter, corrected):
    """‖(W + s·B_c·A)P − (W_e + s·B·A)P‖ over ‖(W_e − W)P‖, the worst layer, by pseudo-inverse."""
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(corrected / "adapter_model.safetensors")
    base_model, emulator_model, worst = load(base), load(emulator), 0.0
    layers = Manifest.read(corrected).layers
    assert layers
    for name in layers:
        down, up, new = (
            tensors[f"base_model.model.{name}.lora_{part}.weight"].double()
            for tensors, part in ((before, "A"), (before, "B"), (after, "B"))
        )
        onto = torch.linalg.pinv(down) @ down
        weight, compressed = dense_weight(base_model, name), dense_weight(emulator_model, name)
        left = (weight + 2 * new @ down - compressed - 2 * up @ down) @ onto
        worst = max(
            worst, float(left.norm() / ((compressed - weight) @ onto).norm().clamp(min=1e-9))
        )
    return worst


def round_trip(root, model_type, dtype=torch.float32, **saving):
    base = root / "base"
    write_tiny(base, model_type, dtype, **saving)
    data = write_rows(root / "train.jsonl", 8, seed=1)
    options = {"dataset": str(data), "max_length": 64, "num_calibration_samples": 8}
    ids = torch.randint(3, 200, (2, 16))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rough = {torch.float32: 1.0, torch.float16: 10.0, torch.bfloat16: 80.0}[dtype]

    full = emloc.compress(
        model_name_or_path=str(base),
        output_dir=root / "full",
        format="low_rank",
        rank_pattern={".*": 10_000},
        **options,
    )
    with torch.no_grad():
        expected, found = load(base)(**batch).logits, load(full)(**batch).logits
    assert (found - expected).abs().max() <= 1e-3 * rough * expected.abs().max()

    half = emloc.compress(
        model_name_or_path=str(base),
        output_dir=root / "half",
        format="low_rank",
        keep_ratio=0.5,
        **options,
    )
    assert Manifest.read(half).layers
    adapter = train_a_step(half, root / "adapter", batch)
    corrected = emloc.correct(
        adapter=str(adapter), emulator=str(half), output_dir=root / "corrected", limit="none"
    )
    assert worst_correction(base, half, adapter, corrected) <= 1e-4

    merged = emloc.merge(adapter=str(corrected), output_dir=root / "merged")
    stock = PeftModel.from_pretrained(load(base), str(corrected)).merge_and_unload().state_dict()
    ours = load(merged).state_dict()
    assert ours.keys() == stock.keys()
    for name, tensor in stock.items():
        assert torch.equal(ours[name], tensor.to(dtype).to(tensor.dtype)), name
    emloc.verify(path=half)
    emloc.verify(path=merged)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_round_trip(model_type, tmp_path):
    round_trip(tmp_path, model_type)


@pytest.mark.parametrize("model_type", NAMED)
@pytest.mark.parametrize(
    ("dtype", "shard"), [(torch.bfloat16, "40KB"), (torch.float16, "1GB")], ids=["bf16", "fp16"]
)
def test_half_precision_and_shards(model_type, dtype, shard, tmp_path):
    round_trip(tmp_path, model_type, dtype, max_shard_size=shard)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1 or dtype == torch.float16
    stored = {i.dtype for i in Checkpoint.open(tmp_path / "merged").tensors.values()}
    assert stored == {dtype}


def test_fused_experts_stay_dense_and_are_named(tmp_path, capfd):
    write_tiny(tmp_path / "base", "mixtral")
    data = write_rows(tmp_path / "train.jsonl", 8, seed=1)
    folder = emloc.compress(
        model_name_or_path=str(tmp_path / "base"), dataset=str(data), output_dir=tmp_path / "e"
    )
    kept = Manifest.read(folder).kept_dense
    assert kept["model.layers.1.mlp.experts.gate_up_proj"] == "no linear layer"
    said = " ".join(capfd.readouterr().err.split())
    assert "4 weights stay dense (no linear layer): model.layers.0.mlp.experts.gate_up_proj" in said


def test_layers_that_the_forward_leaves_out_stay_dense(tmp_path, capfd):
    write_tiny(tmp_path / "base", "bart")  # its decoder, without the encoder to attend to
    data = write_rows(tmp_path / "train.jsonl", 8, seed=1)
    folder = emloc.compress(
        model_name_or_path=str(tmp_path / "base"), dataset=str(data), output_dir=tmp_path / "e"
    )
    kept = Manifest.read(folder).kept_dense
    assert kept["model.decoder.layers.0.encoder_attn.q_proj"] == "no calibration token reached it"
    assert "8 weights stay dense (no calibration token reached it)" in " ".join(
        capfd.readouterr().err.split()
    )


def test_blocks_that_run_again_are_streamed_as_they_run(tmp_path):
    """All stages of a model that goes through its blocks several times, most of them without gradients."""
    write_tiny(tmp_path / "base", "hrm_text")
    data = {"dataset": str(write_rows(tmp_path / "train.jsonl", 8, seed=1)), "max_length": 64}
    base = {"model_name_or_path": str(tmp_path / "base"), **data}
    emulators = [
        emloc.compress(output_dir=tmp_path / weighed, weigh_errors=weighed, **base)
        for weighed in ("alike", "gradients")
    ]
    for emulator in emulators:
        layers = Manifest.read(emulator).layers
        tokens = {name.split(".layers.")[0]: entry["tokens"] for name, entry in layers.items()}
        assert tokens["model.L_module"] > tokens["model.H_module"] > 0
    steps = {"max_steps": 2, "learning_rate": 1e-2, "lora_r": 3, "lora_dropout": 0.0, **data}
    whole, streamed = (
        emloc.train(
            model_name_or_path=base["model_name_or_path"], stream=stream, device="cpu",
            output_dir=tmp_path / str(stream), **steps,
        )
        for stream in (False, True)
    )  # fmt: skip
    ours, stock = (load_file(folder / "adapter_model.safetensors") for folder in (streamed, whole))
    for name, tensor in stock.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)
    adapter = emloc.train(emulator=str(emulators[0]), output_dir=tmp_path / "a", **steps)
    corrected = emloc.correct(
        adapter=str(adapter),
        emulator=str(emulators[0]),
        output_dir=tmp_path / "c",
        limit="auto",
        **data,
    )
    assert Manifest.read(corrected).layers.keys() == Manifest.read(emulators[0]).layers.keys()
    with pytest.raises(ConfigError, match="propagate_errors: block .* runs more than once"):
        emloc.compress(output_dir=tmp_path / "p", propagate_errors=True, **base)


def test_the_list_of_what_is_refused_is_short(pytestconfig):
    """What the run prints at its end (conftest.py at the top)."""
    assert set(REFUSED) <= set(MODEL_TYPES)
    found = {"supported": len(SUPPORTED), "refused": len(REFUSED)}
    pytestconfig.cache.set("emloc/causal_lm_types", {"reasons": REFUSED, "figures": found})
    assert len(REFUSED) <= 30
