"""The frame of everything that writes an artefact, whichever stage or method makes it.

An artefact of the same settings that is there already is left as it is, and said to be complete; another one
is never overwritten. The planned memory is asked for before the work and held to during it. The work is done
in a folder beside `output_dir`, with its seconds and its peak measured, and ends with the manifest, which
lists every file; then the folder gets its name. What an interrupted run had finished is there when the same
run begins anew.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from emloc.artefacts.digest_cache import KnownDigests
from emloc.artefacts.durable import sync_folder, sync_tree
from emloc.artefacts.file_digest import file_sha256
from emloc.artefacts.intact import is_complete, listing
from emloc.artefacts.json_files import read_json
from emloc.artefacts.kinds import Kind
from emloc.artefacts.manifest import Manifest, ModelReference, versions
from emloc.artefacts.seal import SEAL, is_sealed, sealed
from emloc.artefacts.settings import difference, same
from emloc.artefacts.small_files import write_json
from emloc.artefacts.stage_folder import (
    SETTINGS_NAME,
    drop,
    drop_unfinished,
    settle,
    stage_folder,
)
from emloc.artefacts.write_errors import writing
from emloc.errors import CheckpointError, OutputError
from emloc.machine.exact_products import exact_products
from emloc.machine.memory import PeakMemory, streaming_memory
from emloc.machine.progress import console
from emloc.planning.contract import Contract, keeping


@dataclass(frozen=True)
class Written:
    """Content of an artefact, for its manifest, where the fields are explained.

    Attributes:
        files: digests that were computed while files were written; the others are read for theirs.
        measured: beside seconds and peak.
        leftovers: names in the folder of what only a continued run would need; removed after the manifest is
            written.
    """

    files: Mapping[str, str] = field(default_factory=dict[str, str])
    layers: Mapping[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    kept_dense: Mapping[str, str] = field(default_factory=dict[str, str])
    tables: list[dict[str, Any]] | None = None
    summary: Mapping[str, Any] = field(default_factory=dict[str, Any])
    measured: Mapping[str, Any] = field(default_factory=dict[str, Any])
    leftovers: Collection[str] = ()


@dataclass(frozen=True)
class Artefact:
    """An artefact to be made; the first lines of its manifest, where the fields are explained.

    Attributes:
        stage: who makes it, for messages.
        settings: all that shapes it.
        packages: whose versions are recorded.
        device: where the work is done.
        memory: bytes of it that the work may take, or None for any.
        streamed: whether the frame measures the peak; else the work does, and returns it as `peak_bytes`.
    """

    stage: str
    kind: Kind
    output_dir: Path
    settings: Mapping[str, Any]
    family: str
    base_model: ModelReference
    emulator: ModelReference | None = None
    adapter: ModelReference | None = None
    method: str | None = None
    packages: tuple[str, ...] = ()
    device: str = "cpu"
    memory: int | None = None
    streamed: bool = True

    def write(
        self,
        work: Callable[[Path], Written],
        contract: Callable[[], Contract | None] = lambda: None,
    ) -> Path:
        """Make it, unless it is complete already; returns its folder.

        Args:
            work: writes into a folder.
            contract: its planned memory; asked for only if there is something to do.

        Raises:
            OutputError: another artefact is in its place.
            MemoryLimitError: it does not fit, or went beyond its memory.
        """
        settle(self.output_dir)
        if is_complete(self.stage, self.kind, self.output_dir, self.settings, self.family):
            return self.output_dir
        agreed = contract()
        started = time.monotonic()
        with keeping(agreed), stage_folder(self.output_dir, self.settings) as folder:
            written, peak = self._measured(work, folder)
            measured = {
                "seconds": round(time.monotonic() - started, 3),
                **peak,
                **written.measured,
            }
            if agreed is not None:
                agreed.report(measured)
            with writing(folder):
                drop_unfinished(folder)
                sync_tree(folder)  # the manifest says that all of it is there
                self._manifest(folder, written, measured).write(folder)
                drop(folder, written.leftovers)
        KnownDigests(self.output_dir).note(Manifest.read(self.output_dir).files)
        return self.output_dir

    def _measured(
        self, work: Callable[[Path], Written], folder: Path
    ) -> tuple[Written, dict[str, int]]:
        if not self.streamed:
            return work(folder), {}
        limited = PeakMemory(self.device, limit=self.memory)
        with streaming_memory(), exact_products(), limited as peak:
            written = work(folder)
        return written, peak.figures()

    def _manifest(self, folder: Path, written: Written, measured: dict[str, Any]) -> Manifest:
        files, sizes = listing(
            folder, written.files, frozenset((SETTINGS_NAME, *written.leftovers))
        )
        return Manifest.model_validate(
            {
                "kind": self.kind.name,
                "family": self.family,
                "base_model": self.base_model,
                "emulator": self.emulator,
                "adapter": self.adapter,
                "settings": dict(self.settings),
                "layers": dict(written.layers),
                "kept_dense": dict(written.kept_dense),
                "tables": written.tables,
                "summary": dict(written.summary),
                "files": files,
                "sizes": sizes,
                "versions": versions("emloc", *self.packages),
                "method": self.method,
                "measured": measured,
            }
        )


@dataclass(frozen=True)
class Figures:
    """A JSON file of figures to be made, sealed, which says in `settings` what shaped them.

    What is in its folder besides is left alone.

    Attributes:
        stage: who makes it, for messages.
        target: its path; None: it is not written.
        settings: all that shapes it.
        beside: keys of settings that do not count, since a digest among them does.
    """

    stage: str
    target: Path | None
    settings: Mapping[str, Any]
    beside: Collection[str] = ()

    def write(self, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Make it, unless it is complete already; returns the figures with their settings.

        Raises:
            OutputError: another file is in its place, or it cannot be written.
        """
        known = self._known()
        if known is not None:
            console.print(f"{self.stage}: {self.target} is complete already")
            return known
        figures = {**work(), "settings": dict(self.settings)}
        if self.target is not None:
            with writing(self.target):
                self.target.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.target, sealed(figures))
            with writing(self.target):
                sync_folder(self.target.parent)
        return figures

    def _known(self) -> dict[str, Any] | None:
        if self.target is None or not self.target.exists():
            return None
        try:
            recorded = read_json(self.target)
        except CheckpointError as problem:
            raise OutputError(f"{problem} Choose another output_dir or remove it.") from problem
        before = recorded.get("settings")
        if not isinstance(before, dict):
            raise OutputError(
                f"{self.target} is not an emloc {self.target.stem}; choose another output_dir."
            )
        if not is_sealed(recorded):
            raise OutputError(
                f"{self.target} is not what was written (its seal differs); put it back, or remove it."
            )
        before = cast("dict[str, Any]", before)
        if same(before, self.settings, self.beside):
            return {key: value for key, value in recorded.items() if key != SEAL}
        raise OutputError(
            f"{self.target} was made with {difference(before, self.settings, self.beside)}. Choose another "
            f"output_dir or remove it; nothing is ever overwritten."
        )


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files by their names in a folder, for `Written.files`."""
    return {name: file_sha256(folder / name) for name in names}
