"""Nothing broken is called complete, and no stage reads what is not what was written."""

import json
import os
import shutil
import time

import pytest

import emloc
from emloc.artefacts import digest_cache
from emloc.errors import CheckpointError, EmlocError, MismatchError, OutputError
from emloc.testing.resealed import resealed
from emloc.testing.toy_family import write_toy
from emloc.testing.toy_model import ToySizes

LOW_RANK = {"format": "low_rank", "keep_ratio": 0.5}
TRAIN = {"max_steps": 2, "logging_steps": 1, "save_steps": 1, "learning_rate": 1e-2, "lora_r": 3}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))


def copy(toy, name, tmp_path):
    return shutil.copytree(toy.stages[name], tmp_path / name)


def make(toy, name, out):
    """The stage that made an artefact of the toy, in a folder."""
    stages = {key: str(folder) for key, folder in toy.stages.items()}
    if name == "emulator":
        return emloc.compress(output_dir=out, **LOW_RANK, **toy.example)
    if name == "adapter":
        return emloc.train(emulator=stages["emulator"], output_dir=out, **TRAIN, **toy.data)
    if name == "corrected":
        given = {"adapter": stages["adapter"], "emulator": stages["emulator"], "limit": "none"}
        return emloc.correct(output_dir=out, **given, **toy.data)
    return emloc.merge(adapter=stages["corrected"], output_dir=out)


def flip(path):
    """Change one bit in the middle and leave size and times as they are."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def weights(folder):
    return sorted(folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize("name", ["emulator", "adapter", "corrected", "merged"])
def test_what_is_broken_is_not_complete(toy, tmp_path, name):
    """Weights that are gone, empty or changed, with all times as they were."""
    folder = copy(toy, name, tmp_path)
    assert make(toy, name, folder) == folder
    path = weights(folder)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"is missing, and emloc\.json lists it"):
        make(toy, name, folder)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"not what was written \(0 bytes"):
        make(toy, name, folder)
    path.write_bytes(content)
    assert make(toy, name, folder) == folder
    flip(path)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        make(toy, name, folder)


def test_complete_already_reads_nothing_twice_and_verify_everything(toy, tmp_path, monkeypatch):
    folder = copy(toy, "emulator", tmp_path)
    make(toy, "emulator", folder)
    time.sleep(0.1)  # what changed just before it was looked at is looked at again
    make(toy, "emulator", folder)
    with monkeypatch.context() as patch:
        patch.setattr(digest_cache, "file_sha256", None)
        make(toy, "emulator", folder)
        # Somebody who can make a file look unchanged deceives the cache, and not verify.
        held = {path.name: digest_cache._identity(path) for path in folder.iterdir()}
        patch.setattr(digest_cache, "_identity", lambda path: held[path.name])
        flip(weights(folder))
        make(toy, "emulator", folder)
        with pytest.raises(CheckpointError, match="SHA-256 differs"):
            emloc.verify(path=folder)


@pytest.mark.parametrize("change", ["another's shards", "a bit", "a link", "an added file"])
def test_no_stage_reads_another_emulator_under_an_old_manifest(toy, tmp_path, change):
    folder = copy(toy, "emulator", tmp_path)
    if change == "another's shards":
        other = {"model_name_or_path": str(write_toy(tmp_path / "m", ToySizes(), 5))}
        made = emloc.compress(output_dir=tmp_path / "e", **LOW_RANK, **{**toy.example, **other})
        for path in made.glob("*.safetensors"):
            shutil.copy(path, folder / path.name)
    elif change == "a bit":
        flip(weights(folder))
    elif change == "a link":
        path = weights(folder)
        path.rename(tmp_path / "outside")
        path.symlink_to(tmp_path / "outside")
    else:
        shutil.copy(weights(folder), folder / "model.safetensors")
    adapter = str(toy.stages["adapter"])
    for stage in (
        lambda: emloc.correct(
            adapter=adapter, emulator=str(folder), limit="none", output_dir=tmp_path / "c"
        ),
        lambda: emloc.train(emulator=str(folder), output_dir=tmp_path / "c", **TRAIN, **toy.data),
        lambda: emloc.evaluate(model_name_or_path=str(folder), **toy.data),
        lambda: emloc.verify(path=folder),
    ):
        with pytest.raises(CheckpointError, match="not what was written|leads out of|was added"):
            stage()
    assert not (tmp_path / "c").exists()


def test_no_stage_reads_another_adapter_under_an_old_manifest(toy, tmp_path):
    adapter, corrected = copy(toy, "adapter", tmp_path), copy(toy, "corrected", tmp_path)
    flip(weights(adapter))
    path = corrected / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 32', '"lora_alpha": 33'))
    base, out = toy.example["model_name_or_path"], tmp_path / "out"
    emulator = str(toy.stages["emulator"])
    for stage in (
        lambda: emloc.correct(
            adapter=str(adapter), emulator=emulator, limit="none", output_dir=out
        ),
        lambda: emloc.merge(adapter=str(corrected), output_dir=out),
        lambda: emloc.evaluate(model_name_or_path=emulator, adapter=str(adapter), **toy.data),
        lambda: emloc.evaluate(model_name_or_path=base, adapter=str(corrected), **toy.data),
    ):
        with pytest.raises(CheckpointError, match="SHA-256 differs"):
            stage()
    assert not out.exists()


def test_an_adapter_is_scored_on_its_own_model_alone(toy, tmp_path):
    """Unless it is asked for: on shapes alone, every one of these would load."""
    base, stages = toy.example["model_name_or_path"], toy.stages
    other = write_toy(tmp_path / "other", ToySizes(), 5)

    def loss(model, adapter, **options):
        given = {"model_name_or_path": str(model), "adapter": str(adapter), **toy.data}
        return emloc.evaluate(**given, **options)["loss"]

    foreign = copy(toy, "adapter", tmp_path)
    config = json.loads((foreign / "adapter_config.json").read_text())
    named = {**config, "base_model_name_or_path": str(stages["emulator"])}
    (foreign / "adapter_config.json").write_text(json.dumps(named))
    (foreign / "emloc.json").unlink()
    for model, adapter, message in (
        (base, stages["adapter"], "on an emulator and is not corrected"),
        (base, foreign, "on an emulator and is not corrected"),
        (stages["merged"], stages["corrected"], "which already contains an adapter"),
        (stages["emulator"], stages["corrected"], "is corrected for the original"),
        (other, stages["corrected"], "the weights of .* are different"),
    ):
        with pytest.raises(MismatchError, match=message):
            loss(model, adapter)
        assert loss(model, adapter, allow_mismatch=True) > 0
    assert loss(stages["emulator"], stages["adapter"]) > 0
    assert loss(stages["emulator"], foreign) > 0


def test_scores_do_not_go_into_an_artefact(toy, tmp_path):
    folder = copy(toy, "merged", tmp_path)
    with pytest.raises(OutputError, match="holds an artefact"):
        emloc.evaluate(model_name_or_path=str(folder), output_dir=folder, **toy.data)


@pytest.mark.parametrize("form", [3, 0, True, "1", None])
def test_a_manifest_of_another_format_is_refused(toy, tmp_path, form):
    folder = copy(toy, "corrected", tmp_path)
    content = json.loads((folder / "emloc.json").read_text())
    (folder / "emloc.json").write_text(json.dumps({**content, "format": form, "more": 1}))
    for stage in (
        lambda: emloc.verify(path=folder),
        lambda: emloc.merge(adapter=str(folder), output_dir=tmp_path / "m"),
    ):
        with pytest.raises(CheckpointError, match="of the format .* update emloc"):
            stage()


def test_a_manifest_of_before_lists_what_it_lists(toy, tmp_path):
    """Format 1 had the digests of weights alone; what it has still counts."""
    folder = copy(toy, "emulator", tmp_path)
    content = json.loads((folder / "emloc.json").read_text())
    del content["sizes"], content["files"]["config.json"]
    (folder / "emloc.json").write_text(json.dumps({**content, "format": 1}))
    assert emloc.verify(path=folder)["kind"] == "emulator"
    assert make(toy, "emulator", folder) == folder
    flip(weights(folder))
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        make(toy, "emulator", folder)


def test_a_checkpoint_of_training_may_be_removed_whole(toy, tmp_path):
    folder = copy(toy, "adapter", tmp_path)
    for step in (1, 2):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}/optimizer.pt").write_bytes(b"state")
    resealed(folder)
    shutil.rmtree(folder / "checkpoint-1")
    assert emloc.verify(path=folder)["kind"] == "adapter"
    assert make(toy, "adapter", folder) == folder
    (folder / "checkpoint-2/optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        make(toy, "adapter", folder)
    emloc.correct(
        adapter=str(folder), emulator=str(toy.stages["emulator"]), limit="none",
        output_dir=tmp_path / "c",
    )  # fmt: skip


EDITS = {
    "a number in the config": lambda f: edit(f / "config.json", "12", "13"),
    "a bit of the weights": lambda f: flip(weights(f)),
    "an added file": lambda f: (f / "notes.md").write_text("x"),
    "an added folder": lambda f: shutil.move(shutil.copytree(f, f.parent / "x"), f / "x"),
    "another figure in the manifest": lambda f: edit(
        f / "emloc.json", '"seconds": ', '"seconds": 1'
    ),
    "a file that is gone": lambda f: (f / "config.json").unlink(),
}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("name", ["emulator", "merged"])
def test_verify_finds_every_edit(toy, tmp_path, name, change):
    folder = copy(toy, name, tmp_path)
    emloc.verify(path=folder)
    change(folder)
    with pytest.raises(EmlocError):
        emloc.verify(path=folder)
