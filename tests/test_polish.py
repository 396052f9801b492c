"""A few steps on the original from a LoRA that is there: against stock PEFT, in memory and streamed."""

import json

import pytest
import torch
from own_families import installed
from safetensors.torch import load_file

import emloc
from emloc.errors import ConfigError, MismatchError
from emloc.extend.plugins import family_named

QUICK = {"device": "cpu", "logging_steps": 1}
STEPS = {**QUICK, "max_steps": 2, "samples_per_step": 4, "per_device_train_batch_size": 2}


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def manifest(folder):
    return json.loads((folder / "emloc.json").read_text())


@pytest.fixture(scope="module", params=["llm", "vlm", "diffusion", "text-to-text"])
def example(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with installed(request.param):
        yield {**family_named(request.param).write_example(folder, seed=0), "family": request.param}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return family_named("llm").write_example(tmp_path_factory.mktemp("llm"), seed=0)


def trained(example, folder, **more):
    options = {**example, **QUICK, "max_steps": 2, "per_device_train_batch_size": 2, "lora_r": 3}
    return emloc.train(output_dir=folder, learning_rate=1e-2, **{**options, **more})


@pytest.fixture(scope="module")
def adapter(example, tmp_path_factory):
    return trained(example, tmp_path_factory.mktemp("trained") / "adapter")


@pytest.fixture(scope="module")
def llm_adapter(llm, tmp_path_factory):
    return trained(llm, tmp_path_factory.mktemp("trained") / "adapter")


def test_streamed_steps_are_those_in_memory_and_better_than_what_came(example, adapter, tmp_path):
    options = {**example, **STEPS, "num_held_back_samples": 4, "learning_rate": 1e-2}
    made = [
        emloc.polish(adapter=str(adapter), output_dir=tmp_path / str(way), stream=way, **options)
        for way in (True, False)
    ]
    streamed, whole = map(tensors, made)
    before = tensors(adapter)
    assert streamed.keys() == whole.keys() == before.keys()
    for name, tensor in streamed.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(streamed[name], before[name]) for name in before)
    summaries = [manifest(folder)["summary"] for folder in made]
    for summary in summaries:
        first, last = summary["held_back_loss"]
        assert summary["kept"] is (last < first)
    assert summaries[0]["held_back_loss"] == pytest.approx(summaries[1]["held_back_loss"], rel=1e-5)


def test_the_loss_before_is_that_of_the_adapter_on_the_original(llm, llm_adapter, tmp_path):
    """All samples but the two held back are learnt; what is held back is scored by evaluate."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from emloc.config import TrainConfig
    from emloc.extend.plugin_options import with_family_options
    from emloc.integrations.transformers.held_back import hold_back
    from emloc.integrations.transformers.loading import load_tokenizer
    from emloc_llm.data import load_samples, pad

    polished = emloc.polish(
        adapter=str(llm_adapter),
        output_dir=tmp_path / "polished",
        num_held_back_samples=2,
        **{**STEPS, "per_device_train_batch_size": 1},
        **{name: value for name, value in llm.items() if name != "model_name_or_path"},
    )
    family, base = family_named("llm"), llm["model_name_or_path"]
    options = {**llm, "output_dir": tmp_path / "x", "num_held_back_samples": 2}
    config = with_family_options(TrainConfig, family)(**options)
    tokenizer = load_tokenizer(base)
    samples = load_samples(config, tokenizer, 0)
    learnt, held_back = hold_back(samples, config)
    assert len(held_back) == 2
    assert len(learnt) == len(samples) - 2
    assert manifest(polished)["summary"]["samples"] == len(learnt)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(llm_adapter))
    with torch.no_grad():
        batches = [pad([sample], tokenizer.pad_token_id) for sample in held_back]
        losses = [float(model(**batch).loss) for batch in batches]
    before, _ = manifest(polished)["summary"]["held_back_loss"]
    assert before == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_one_step_is_that_of_stock_peft(llm, llm_adapter, tmp_path):
    """One step on all samples: AdamW moves each number against the sign of its gradient."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from emloc.config import TrainConfig
    from emloc.extend.plugin_options import with_family_options
    from emloc.integrations.transformers.loading import load_tokenizer
    from emloc_llm.data import load_samples, pad

    family, base, rate = family_named("llm"), llm["model_name_or_path"], 1e-3
    tokenizer = load_tokenizer(base)
    config = with_family_options(TrainConfig, family)(**llm, output_dir=tmp_path / "x")
    samples = load_samples(config, tokenizer, 0)
    polished = emloc.polish(
        adapter=str(llm_adapter), output_dir=tmp_path / "polished", max_steps=1, learning_rate=rate,
        warmup_ratio=0.0, lr_scheduler_type="constant", max_grad_norm=1e9, num_held_back_samples=0,
        samples_per_step=len(samples), per_device_train_batch_size=1, **QUICK, **llm,
    )  # fmt: skip
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(llm_adapter), is_trainable=True
    )
    sums, tokens = [], 0
    for sample in samples:
        batch = pad([sample], tokenizer.pad_token_id)
        count = int((batch["labels"][:, 1:] >= 0).sum())
        sums.append(model(**batch).loss * count)
        tokens += count
    (sum(sums) / tokens).backward()
    made, before = tensors(polished), tensors(llm_adapter)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.replace(".default", "")
            gradient = parameter.grad
            expected = before[key] - rate * gradient / (gradient.abs() + 1e-8)
            clear = gradient.abs() > 1e-6  # where rounding does not turn the sign
            torch.testing.assert_close(
                made[key][clear], expected[clear], rtol=1e-3, atol=1e-3 * rate
            )
            assert clear.float().mean() > 0.5


def test_what_makes_the_held_back_loss_worse_is_refused(example, adapter, tmp_path, capsys):
    rate = 1.0 if example["family"] == "diffusion" else 50.0
    polished = emloc.polish(
        adapter=str(adapter), output_dir=tmp_path / "polished", learning_rate=rate,
        max_grad_norm=1e9, lr_scheduler_type="constant", warmup_ratio=0.0,
        num_held_back_samples=4, **{**STEPS, "max_steps": 4}, **example,
    )  # fmt: skip
    made = manifest(polished)
    before, after = made["summary"]["held_back_loss"]
    assert after > before
    assert made["summary"]["kept"] is False
    assert "the adapter stays as it came" in capsys.readouterr().err
    held, expected = tensors(polished), tensors(adapter)
    assert all(torch.equal(held[name], expected[name]) for name in expected)


def test_a_run_polishes_what_was_corrected_and_merges_what_was_polished(llm, tmp_path):
    results = emloc.run(
        {
            **llm, **QUICK, "output_dir": str(tmp_path), "learning_rate": 1e-2,
            "compress": {"bits_per_weight": 3.2, "num_calibration_samples": 4},
            "train": {"max_steps": 2, "lora_r": 3},
            "correct": {"num_calibration_samples": 4},
            "polish": {"max_steps": 2, "samples_per_step": 4, "num_held_back_samples": 0},
            "merge": {},
        }
    )  # fmt: skip
    assert list(results) == ["compress", "train", "correct", "polish", "merge"]
    from emloc.artefacts.adapter import Adapter

    corrected, polished = (Adapter.open(str(tmp_path / n)) for n in ("corrected", "polished"))
    assert manifest(tmp_path / "polished")["settings"]["adapter_digest"] == corrected.digest()
    assert manifest(tmp_path / "merged")["settings"]["adapter_digest"] == polished.digest()
    chain = emloc.verify(path=tmp_path / "merged")["chain"]
    assert [link["kind"] for link in chain] == ["adapter", "adapter", "adapter", "emulator", "base"]
    assert all(link["checked"] for link in chain)


def test_an_uncorrected_adapter_is_polished_on_the_original_of_its_emulator(llm, tmp_path):
    emloc.compress(
        **llm, **{"device": "cpu"}, output_dir=tmp_path / "emulator", bits_per_weight=3.2
    )
    data = {name: value for name, value in llm.items() if name != "model_name_or_path"}
    adapter = trained(data, tmp_path / "adapter", emulator=str(tmp_path / "emulator"))
    polished = emloc.polish(adapter=str(adapter), output_dir=tmp_path / "polished", **STEPS, **data)
    made = manifest(polished)
    assert made["kind"] == "corrected_adapter"
    assert made["base_model"]["name_or_path"] == llm["model_name_or_path"]
    config = json.loads((polished / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == llm["model_name_or_path"]


def test_dora_goes_on_from_its_magnitudes(llm, tmp_path):
    adapter = trained(llm, tmp_path / "adapter", use_dora=True)
    options = {**llm, **STEPS, "num_held_back_samples": 0, "learning_rate": 1e-2}
    streamed, whole = (
        tensors(emloc.polish(adapter=str(adapter), output_dir=tmp_path / n, stream=way, **options))
        for n, way in (("streamed", True), ("whole", False))
    )
    assert any("magnitude" in name for name in streamed)
    for name, tensor in streamed.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-5)


def test_ranks_and_scalings_of_the_adapter_hold(llm, tmp_path):
    adapter = trained(
        llm, tmp_path / "adapter", lora_rank_pattern="q_proj=5", lora_alpha_pattern="q_proj=7"
    )
    polished = emloc.polish(adapter=str(adapter), output_dir=tmp_path / "polished", **STEPS, **llm)
    before, after = tensors(adapter), tensors(polished)
    assert {name: t.shape for name, t in before.items()} == {n: t.shape for n, t in after.items()}
    from emloc.artefacts.adapter import Adapter

    scalings = [
        {layer.name: layer.scaling for layer in Adapter.open(str(f)).layers}
        for f in (adapter, polished)
    ]
    assert scalings[0] == pytest.approx(scalings[1])


def test_an_interrupted_polish_goes_on_exactly(llm, llm_adapter, tmp_path, monkeypatch):
    from emloc.integrations.transformers.streamed_training import StreamedSteps

    options = {**llm, **STEPS, "save_steps": 1, "num_held_back_samples": 2, "max_steps": 3}
    whole = emloc.polish(adapter=str(llm_adapter), output_dir=tmp_path / "whole", **options)
    step = StreamedSteps.training_step

    def killed(trainer, *given):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return step(trainer, *given)

    with monkeypatch.context() as patch:
        patch.setattr(StreamedSteps, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            emloc.polish(adapter=str(llm_adapter), output_dir=tmp_path / "again", **options)
    again = emloc.polish(adapter=str(llm_adapter), output_dir=tmp_path / "again", **options)
    held, expected = tensors(again), tensors(whole)
    assert all(torch.equal(held[name], expected[name]) for name in expected)
    assert manifest(again)["summary"] == manifest(whole)["summary"]


def test_training_goes_on_from_an_adapter(llm, llm_adapter, tmp_path):
    """With a rate that moves nothing, what comes out is what went in."""
    options = {**llm, **QUICK, "max_steps": 1, "learning_rate": 1e-30}
    made = emloc.train(adapter=str(llm_adapter), output_dir=tmp_path / "adapter", **options)
    held, expected = tensors(made), tensors(llm_adapter)
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in expected)
    chain = emloc.verify(path=made)["chain"]
    assert [(link["kind"], link["checked"]) for link in chain] == [
        ("adapter", True),
        ("base", True),
    ]
    with pytest.raises(ConfigError, match="lora_r is for a new LoRA"):
        emloc.train(
            adapter=str(llm_adapter), output_dir=tmp_path / "other", **{**options, "lora_r": 4}
        )


def test_steps_that_the_data_do_not_fill_are_said(llm, llm_adapter, tmp_path, capsys):
    options = {
        **llm,
        **STEPS,
        "max_steps": 8,
        "samples_per_step": 7,
        "per_device_train_batch_size": 7,
    }
    polished = emloc.polish(adapter=str(llm_adapter), output_dir=tmp_path / "short", **options)
    summary = manifest(polished)["summary"]
    rest = summary["samples"] % 7
    assert rest, "the example fills its steps"
    said = " ".join(capsys.readouterr().err.split())
    assert f"the last step of every epoch has {rest} of them" in said


def test_diffusers_name_for_the_batch_may_be_larger_than_a_step(tmp_path):
    example = family_named("diffusion").write_example(tmp_path / "example", seed=0)
    options = {**example, **QUICK, "max_steps": 1, "train_batch_size": 2}
    adapter = emloc.train(output_dir=tmp_path / "adapter", lora_r=2, **options)
    polished = emloc.polish(
        adapter=str(adapter), output_dir=tmp_path / "polished", samples_per_step=1, **options
    )
    assert manifest(polished)["settings"]["per_device_train_batch_size"] == 2


def test_text_encoders_are_polished_along(tmp_path):
    example = family_named("diffusion").write_example(tmp_path / "example", seed=0)
    adapter = trained(example, tmp_path / "adapter", train_text_encoder=True)
    options = {**example, **STEPS, "num_held_back_samples": 4, "learning_rate": 1e-2}
    with pytest.raises(ConfigError, match="text_encoder; train it too"):
        emloc.polish(adapter=str(adapter), output_dir=tmp_path / "polished", **options)
    polished = emloc.polish(
        adapter=str(adapter), output_dir=tmp_path / "both", train_text_encoder=True, **options
    )
    part = "text_encoder/adapter_model.safetensors"
    before, after = load_file(adapter / part), load_file(polished / part)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_memory_is_planned_and_kept(llm, llm_adapter, tmp_path):
    polished = emloc.polish(
        adapter=str(llm_adapter), output_dir=tmp_path / "polished", memory="2GiB", **STEPS, **llm
    )
    measured = manifest(polished)["measured"]
    assert 0 < measured["planned_bytes"] < 2**31
    plan = emloc.plan(model_name_or_path=llm["model_name_or_path"])
    assert plan["beside"]["polish"]["device_bytes"]["total"] > 0
    assert "polish" not in plan["stages"]


def test_what_cannot_be_polished_is_refused(llm, llm_adapter, tmp_path):
    data = {name: value for name, value in llm.items() if name != "model_name_or_path"}
    place = {"output_dir": tmp_path / "polished", **STEPS}
    with pytest.raises(ConfigError, match="polish: dataset is required"):
        emloc.polish(adapter=str(llm_adapter), **place)
    with pytest.raises(
        ConfigError, match="not a multiple of per_device_train_batch_size=3; pass 3"
    ):
        emloc.polish(
            adapter=str(llm_adapter), **{**place, "per_device_train_batch_size": 3}, **data
        )
    other = family_named("llm").write_example(tmp_path / "other", seed=1)["model_name_or_path"]
    with pytest.raises(MismatchError, match="the weights of .* are different"):
        emloc.polish(adapter=str(llm_adapter), model_name_or_path=other, **place, **data)
    whole = trained(llm, tmp_path / "whole", lora_modules_to_save="lm_head")
    with pytest.raises(ConfigError, match="pass stream=false"):
        emloc.polish(adapter=str(whole), **place, **data)
    polished = emloc.polish(adapter=str(whole), stream=False, **place, **data)
    assert any("lm_head" in name for name in tensors(polished))
    assert not (tmp_path / "polished.partial").exists()
