"""The frame of everything that writes an artefact: made once, whole, and never over another."""

import hashlib
import json

import pytest

from emloc.artefacts.kinds import ADAPTER, EMULATOR
from emloc.artefacts.manifest import Manifest, ModelReference
from emloc.errors import OutputError
from emloc.stages.frame import Artefact, Figures, Written, digests

BASE = ModelReference(name_or_path="base", digest="0" * 64)


def artefact(folder, kind=EMULATOR, **settings):
    return Artefact("repair", kind, folder, settings, "toy", BASE, packages=("torch",))


def writing(times):
    def work(folder):
        times.append(folder)
        (folder / "weights").write_bytes(b"values")
        (folder / "notes").write_text("for a continued run")
        return Written(
            digests(folder, ["weights"]),
            {"layer": {"rank": 3}},
            summary={"bytes": 6},
            measured={"blocks": 2},
            leftovers=["notes"],
        )

    return work


def test_the_manifest_says_what_was_made_and_what_it_cost(tmp_path):
    out = artefact(tmp_path / "out", rank=3).write(writing([]))
    assert sorted(path.name for path in out.iterdir()) == ["emloc.json", "weights"]
    manifest = Manifest.read(out)
    assert (manifest.kind, manifest.family, manifest.base_model) == ("emulator", "toy", BASE)
    assert manifest.settings == {"rank": 3}
    assert manifest.layers == {"layer": {"rank": 3}}
    assert manifest.files == {"weights": hashlib.sha256(b"values").hexdigest()}
    assert set(manifest.versions) == {"python", "emloc", "torch"}
    assert set(manifest.measured) == {"seconds", "peak_bytes", "host_peak_bytes", "blocks"}


def test_what_is_complete_is_not_made_again_and_asks_for_no_memory(tmp_path, capsys):
    times = []
    artefact(tmp_path / "out", rank=3).write(writing(times))

    def contract():
        raise AssertionError("nothing is to be done")

    again = artefact(tmp_path / "out", rank=3).write(writing(times), contract)
    assert (again, len(times)) == (tmp_path / "out", 1)
    assert "repair: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "message"),
    [({"rank": 4}, "rank 3, now 4"), ({"rank": 3, "kind": ADAPTER}, "another kind")],
)
def test_another_artefact_is_never_overwritten(tmp_path, other, message):
    times = []
    artefact(tmp_path / "out", rank=3).write(writing(times))
    with pytest.raises(OutputError, match=message):
        artefact(tmp_path / "out", **other).write(writing(times))
    assert len(times) == 1


def test_a_run_that_failed_leaves_its_folder_to_the_next(tmp_path):
    def breaks(folder):
        (folder / "half").write_text("done so far")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        artefact(tmp_path / "out", rank=3).write(breaks)
    assert not (tmp_path / "out").exists()
    seen = []

    def goes_on(folder):
        seen.extend(sorted(path.name for path in folder.iterdir()))
        return Written({})

    out = artefact(tmp_path / "out", rank=3).write(goes_on)
    assert "half" in seen
    assert (out / "half").read_text() == "done so far"


def test_figures_that_were_edited_are_not_called_complete(tmp_path):
    figures = Figures("evaluate", tmp_path / "evaluation.json", {"seed": 0})
    made = figures.write(lambda: {"loss": 1.5, "score": 0.5})
    assert figures.write(lambda: pytest.fail("they are there")) == made
    text = (tmp_path / "evaluation.json").read_text()
    unsealed = json.dumps({k: v for k, v in json.loads(text).items() if k != "seal"})
    for edited in (text.replace("1.5", "0.5"), unsealed):
        (tmp_path / "evaluation.json").write_text(edited)
        with pytest.raises(OutputError, match="seal differs"):
            figures.write(lambda: {"loss": 1.5, "score": 0.5})
        assert (tmp_path / "evaluation.json").read_text() == edited
