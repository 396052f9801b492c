"""Training with TRL on the emulator: it learns, resumes exactly, and refuses what cannot work."""

import json
import shutil

import pytest
from llm_reference import load
from safetensors.torch import load_file
from warm_python import run_python

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.errors import CheckpointError, ConfigError, DataError, NumericalError, OutputError
from emloc.extend.plugin_options import with_plugin_options
from emloc.integrations.transformers.checkpoints import last_whole_checkpoint


def test_what_training_leaves(tiny):
    names = {path.name for path in tiny.adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "emloc.json", "trainer_log.jsonl",
            "training_loss.png", "checkpoint-6", "tokenizer.json"} <= names  # fmt: skip
    log = [
        json.loads(line) for line in (tiny.adapter / "trainer_log.jsonl").read_text().splitlines()
    ]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    manifest = Manifest.read(tiny.adapter)
    assert manifest.base_model == Manifest.read(tiny.emulator).base_model
    held = sum(p.numel() * p.element_size() for p in load(tiny.emulator).parameters())
    lora = sum(t.nbytes for t in load_file(tiny.adapter / "adapter_model.safetensors").values())
    assert manifest.summary["train_weight_bytes"] == held + lora
    assert manifest.measured["seconds_per_step"] > 0


def assert_same_names(one, other):
    names = [sorted(path.name for path in folder.iterdir()) for folder in (one, other)]
    assert names[0] == names[1]


def test_an_interrupted_run_resumes_exactly(tiny, tmp_path, monkeypatch):
    """Stop after step 5, between two logs: weights, optimiser, order, dropout and log go on.

    From checkpoint-4, or where that was damaged from the one before.
    """
    from emloc.integrations.transformers.training import Progression

    options = {**tiny.train_options, "lora_dropout": 0.2, "logging_steps": 3}
    whole = emloc.train(output_dir=tmp_path / "whole", **options)
    original = Progression.on_step_end

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progression, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        emloc.train(output_dir=tmp_path / "cut", **options)
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(Progression, "on_step_end", original)
    left = tmp_path / "cut.partial"
    assert sorted(path.name for path in left.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    # A checkpoint that was being written when the process died must not be taken.
    shutil.copytree(left / "checkpoint-4", left / "checkpoint-6")
    (left / "checkpoint-6/digests.json").rename(left / "checkpoint-6/digests.json.tmp")
    shutil.copytree(left, tmp_path / "torn.partial")
    (tmp_path / "torn.partial/checkpoint-4/optimizer.pt").write_bytes(b"")
    names = {path.name for path in whole.iterdir() if path.is_file()}
    assert names >= {"trainer_log.jsonl", "adapter_model.safetensors", "training_loss.png"}
    for resumed in (tmp_path / "cut", tmp_path / "torn"):
        emloc.train(output_dir=resumed, **options)
        for name in names - {
            "emloc.json",
            "training_args.bin",
            "README.md",
        }:  # they name the folder
            assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
        kept = [sorted(path.name for path in made.glob("*-*")) for made in (whole, resumed)]
        assert kept == [["checkpoint-4", "checkpoint-6"]] * 2
        assert_same_names(whole / "checkpoint-6", resumed / "checkpoint-6")
        assert emloc.verify(path=resumed)["kind"] == "adapter"


def test_killed_after_its_last_step_takes_no_other(tiny, tmp_path, monkeypatch):
    """All checkpoints are there, and the adapter is not yet written."""
    options = {**tiny.train_options, "max_steps": 4, "lr_scheduler_type": "constant"}
    whole = emloc.train(output_dir=tmp_path / "whole", **options)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("emloc.integrations.transformers.lora_training.plot_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            emloc.train(output_dir=tmp_path / "cut", **options)
    (tmp_path / "cut.partial/adapter_model.safetensors").unlink()
    cut = emloc.train(output_dir=tmp_path / "cut", **options)
    for name in ("adapter_model.safetensors", "trainer_log.jsonl", "training_loss.png"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert Manifest.read(cut).summary == Manifest.read(whole).summary
    assert Manifest.read(cut).summary["steps"] == 4


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(tiny, tmp_path):
    checkpoint = shutil.copytree(tiny.adapter / "checkpoint-4", tmp_path / "checkpoint-4")
    (checkpoint / "optimizer.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is not what was written"):
        emloc.train(
            output_dir=tmp_path / "a", resume_from_checkpoint=str(checkpoint), **tiny.train_options
        )


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"learning_rate": 0.1}, "learning_rate .*, now 0.1"),
        ({"lora_alpha": 64}, "lora_alpha .*, now 64"),
        ({"lora_target_modules": "k_proj"}, "lora_target_modules"),
        ({"per_device_train_batch_size": 3}, "per_device_train_batch_size"),
        ({"data": "test"}, "other data"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tiny, tmp_path, option, said):
    given = {**tiny.train_options, **option}
    if given.pop("data", None):
        given["dataset"] = str(tiny.test)
    checkpoint = shutil.copytree(tiny.adapter / "checkpoint-4", tmp_path / "checkpoint-4")
    with pytest.raises(ConfigError, match=said):
        emloc.train(output_dir=tmp_path / "a", resume_from_checkpoint=str(checkpoint), **given)


def test_a_checkpoint_may_be_gone_on_from_for_longer(tiny, tmp_path):
    """The settings name the checkpoint: with another one, the adapter would be another."""
    checkpoint = shutil.copytree(tiny.adapter / "checkpoint-4", tmp_path / "checkpoint-4")
    given = {**tiny.train_options, "max_steps": tiny.train_options["max_steps"] + 1}
    longer = emloc.train(output_dir=tmp_path / "a", resume_from_checkpoint=str(checkpoint), **given)
    assert Manifest.read(longer).summary["steps"] == given["max_steps"]
    with pytest.raises(OutputError, match="another checkpoint to resume from"):
        emloc.train(output_dir=tmp_path / "a", **given)


def test_a_checkpoint_of_another_lora_is_refused(tiny, tmp_path):
    """One of another library has no settings."""
    checkpoint = shutil.copytree(tiny.adapter / "checkpoint-4", tmp_path / "checkpoint-4")
    for name in ("stage_settings.json", "digests.json"):
        (checkpoint / name).unlink()
    for option, said in (
        ({"lora_alpha": 64}, "scaling"),
        ({"lora_target_modules": "k_proj"}, "on .* none"),
        ({"use_dora": True}, "magnitudes"),
    ):
        with pytest.raises(CheckpointError, match=said):
            emloc.train(
                output_dir=tmp_path / "a",
                resume_from_checkpoint=str(checkpoint),
                **{**tiny.train_options, **option},
            )


def test_the_newest_whole_checkpoint_is_taken(tiny, tmp_path, capsys):
    """The older of two is taken, whatever was changed or is missing in the newer one."""
    assert last_whole_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-9").mkdir()
    for step in (4, 6):
        shutil.copytree(tiny.adapter / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    assert "checkpoint-9 is skipped: it was being written" in capsys.readouterr().err
    newest = tmp_path / "checkpoint-6"
    names = {path.name for path in newest.iterdir()}
    assert {"optimizer.pt", "adapter_model.safetensors", "rng_state.pth", "digests.json"} <= names
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4", path.name
        assert "checkpoint-6 is skipped" in capsys.readouterr().err
        path.unlink()
        assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4", path.name
        path.write_bytes(content)
    assert last_whole_checkpoint(tmp_path) == newest


def test_two_runs_are_byte_identical(tiny, tmp_path):
    again = emloc.train(output_dir=tmp_path / "again", **tiny.train_options)
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (tiny.adapter / name).read_bytes()


def test_lora_options_reach_peft(tiny, tmp_path):
    options = {
        **tiny.train_options, "max_steps": 1, "lora_target_modules": "q_proj,down_proj",
        "lora_rank_pattern": {"down_proj": 2}, "lora_alpha_pattern": {"q_proj": 7},
        "use_rslora": True, "use_dora": True, "lora_dropout": 0.1, "gradient_checkpointing": True,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3,
        "eval_dataset": str(tiny.test), "eval_steps": 1, "report_to": "tensorboard",
        "lr_scheduler_type": "linear", "warmup_ratio": 0.5,
    }  # fmt: skip
    folder = emloc.train(output_dir=tmp_path / "a", **options)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_rslora"] is config["use_dora"] is True
    assert config["alpha_pattern"] == {"q_proj": 7}
    tensors = load_file(folder / "adapter_model.safetensors")
    ranks = {key.split(".")[-3]: t.shape[0] for key, t in tensors.items() if "lora_A" in key}
    assert ranks == {"q_proj": 4, "down_proj": 2}
    assert any("lora_magnitude_vector" in key for key in tensors)
    log = (folder / "trainer_log.jsonl").read_text()
    assert "eval_loss" in log
    assert list(folder.rglob("events.out.tfevents.*"))


def test_data_formats_give_the_same_samples(tiny, tmp_path):
    from datasets import Dataset

    from emloc.config import TrainConfig
    from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
    from emloc_llm.data import IGNORED, encode_all
    from emloc_llm.rows import load_rows

    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "d.csv").write_text("question,answer\n" + "".join(f"q{i},a{i}\n" for i in range(3)))
    Dataset.from_list(
        [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    ).to_parquet(tmp_path / "d.parquet")
    tokenizer = byte_tokenizer()
    found = []
    for name, mapping in (("d.jsonl", True), ("d.csv", True), ("d.parquet", False)):
        config = with_plugin_options(TrainConfig)(
            output_dir="o", dataset=str(tmp_path / name),
            column_map={"question": "prompt", "answer": "completion"} if mapping else {},
        )  # fmt: skip
        found.append(encode_all(load_rows(config), tokenizer, config, name))
    assert found[0] == found[1] == found[2]
    sample = found[0][1]
    end = tokenizer.eos_token_id
    answer = tokenizer("a1")["input_ids"]
    assert sample.labels == [IGNORED, IGNORED, *answer, end]
    assert sample.input_ids == [*tokenizer("q1")["input_ids"], *answer, end]
    whole = with_plugin_options(TrainConfig)(output_dir="o", completion_only_loss=False)
    assert encode_all([{"prompt": "q", "completion": "a"}], tokenizer, whole, "x")[0].labels[0] >= 0
    text = encode_all([{"text": "hello"}], tokenizer, whole, "x")[0]
    assert text.labels == text.input_ids


def test_chat_loss_is_on_the_last_answer_only(tiny):
    from emloc.config import TrainConfig
    from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
    from emloc_llm.data import IGNORED, encode

    tokenizer = byte_tokenizer()
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "and?"), ("assistant", "no")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    sample = encode(row, tokenizer, with_plugin_options(TrainConfig)(output_dir="o"))
    learnt = [label for label in sample.labels if label != IGNORED]
    assert tokenizer.decode(learnt) == "no<|im_end|>\n"
    assert sample.reference == "no"


def test_refusals(tiny, tmp_path):
    def train(**options):
        emloc.train(output_dir=tmp_path / "x", **{**tiny.train_options, **options})

    with pytest.raises(DataError, match="every label is masked"):
        train(max_length=10)
    with pytest.raises(ConfigError, match=r"no module q_prj\. Did you mean q_proj\?"):
        train(lora_target_modules="q_prj")
    for option in ("lora_rank_pattern", "lora_alpha_pattern"):
        with pytest.raises(ConfigError, match=f"{option}: 'q_prj' matches no layer"):
            train(**{option: {"q_prj": 4}})
    with pytest.raises(ConfigError, match="eval_steps is for an eval_dataset"):
        train(eval_steps=2)
    with pytest.raises(ConfigError, match="either emulator, or model_name_or_path"):
        train(model_name_or_path=str(tiny.base))
    with pytest.raises(ConfigError, match="dataset is required"):
        train(dataset=None)
    with pytest.raises(ConfigError, match="lr_scheduler_type|SchedulerType|scheduler"):
        train(lr_scheduler_type="cosinus")
    with pytest.raises(CheckpointError, match="not a complete training checkpoint"):
        train(resume_from_checkpoint=str(tmp_path))
    with pytest.raises(CheckpointError, match="not written by emloc"):
        train(emulator=str(tiny.base))
    with pytest.raises(CheckpointError, match="is a LoRA adapter, not a model"):
        train(emulator=str(tiny.adapter))
    assert not (tmp_path / "x").exists()


def test_truncated_samples_are_counted_and_said(tiny, tmp_path, capfd):
    folder = emloc.train(
        output_dir=tmp_path / "a", **{**tiny.train_options, "max_steps": 1, "max_length": 40}
    )
    said = " ".join(capfd.readouterr().err.split())
    count = Manifest.read(folder).summary["truncated_samples"]
    assert count > 0
    assert f"{count} of 24 samples" in said
    assert "longer than max_length=40" in said


SMALL_FILES = """
import resource, signal, sys
import emloc
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
try:
    emloc.train(**dict(pair.split("=", 1) for pair in sys.argv[2:]))
except emloc.errors.OutputError as problem:
    print("refused:", problem)
"""


@pytest.mark.parametrize("limit", [20_000, 70_000])
def test_a_limit_on_files_is_one_sentence(tiny, tmp_path, limit):
    """The system refuses the adapter's file, or the optimiser's alone."""
    options = {**tiny.train_options, "output_dir": tmp_path / "a"}
    pairs = [f"{key}={value}" for key, value in options.items()]
    run = run_python("-c", "import emloc.errors\n" + SMALL_FILES, limit, *pairs)
    assert "the limit on the size of files allows (ulimit -f)" in run.stdout, run.stderr[-2000:]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_go_through_all_stages(tiny, tmp_path, dtype):
    import torch

    from emloc_llm.example import write_model

    base = write_model(tmp_path / "base", dtype=getattr(torch, dtype))
    common = {"dataset": str(tiny.data), "max_length": 96}
    emulator = emloc.compress(model_name_or_path=str(base), output_dir=tmp_path / "e", **common)
    options = {**tiny.train_options, "emulator": str(emulator), "max_steps": 2}
    adapter = emloc.train(output_dir=tmp_path / "a", **options)
    corrected = emloc.correct(
        adapter=str(adapter), emulator=str(emulator), output_dir=tmp_path / "c", **common
    )
    merged = emloc.merge(adapter=str(corrected), output_dir=tmp_path / "m")
    assert {p.dtype for p in load(merged, dtype="auto").parameters()} == {getattr(torch, dtype)}


def test_divergence_stops_the_run(tiny, tmp_path):
    with pytest.raises(NumericalError, match="lower learning_rate"):
        emloc.train(output_dir=tmp_path / "a", **{**tiny.train_options, "learning_rate": 1e20})
    assert not (tmp_path / "a").exists()


def test_prompts_and_completions_may_be_messages(tiny):
    from emloc.config import TrainConfig
    from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
    from emloc_llm.data import encode

    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    config, tokenizer = with_plugin_options(TrainConfig)(output_dir="o"), byte_tokenizer()
    split = encode({"prompt": turns[:1], "completion": turns[1:]}, tokenizer, config)
    assert split == encode({"messages": turns}, tokenizer, config)


def test_a_file_has_no_split_to_evaluate_on(tiny, tmp_path):
    given = {**tiny.train_options, "eval_dataset": str(tiny.test), "max_steps": 1}
    with pytest.raises(DataError, match="is one file and has no split 'test'"):
        emloc.train(output_dir=tmp_path / "a", eval_dataset_split="test", **given)


def test_answers_without_an_end_are_told(tiny, tmp_path, capsys):
    """Some templates begin the next turn instead of closing the assistant's."""
    base = shutil.copytree(tiny.base, tmp_path / "base")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    (base / "chat_template.jinja").write_text(template)
    given = {**tiny.train_options, "max_steps": 1}
    del given["emulator"]
    said = "so the LoRA does not learn where an answer ends"
    for model, endless in ((tiny.base, False), (base, True)):
        emloc.train(model_name_or_path=str(model), output_dir=tmp_path / f"a{endless}", **given)
        assert (said in " ".join(capsys.readouterr().err.split())) == endless


def test_a_run_that_goes_on_from_another_ones_checkpoint_goes_on_itself(
    tiny, tmp_path, monkeypatch
):
    """Killed, it does not begin with the other's steps again."""
    from emloc.integrations.transformers.training import Progression

    emloc.train(output_dir=tmp_path / "a", **{**tiny.train_options, "max_steps": 2})
    original, begun = Progression.on_step_begin, list[int]()

    def stop(self, args, state, control, **kwargs):
        begun.append(state.global_step)
        if state.global_step == stopped:
            raise KeyboardInterrupt
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(Progression, "on_step_begin", stop)
    options = {**tiny.train_options, "max_steps": 8, "save_steps": 2}
    options["resume_from_checkpoint"] = str(tmp_path / "a/checkpoint-2")
    stopped = 5
    with pytest.raises(KeyboardInterrupt):
        emloc.train(output_dir=tmp_path / "b", **options)
    assert begun == [2, 3, 4, 5]
    begun.clear()
    stopped = -1
    emloc.train(output_dir=tmp_path / "b", **options)
    assert begun == [4, 5, 6, 7]
    with pytest.raises(CheckpointError, match="is not a complete training checkpoint"):
        emloc.train(
            output_dir=tmp_path / "c",
            **{**options, "resume_from_checkpoint": str(tmp_path / "nowhere/checkpoint-9")},
        )
