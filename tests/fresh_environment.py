"""An environment in which nothing of this repository is installed but the wheels that it is given.

Libraries of others are those of this environment, by links: installing torch anew would show nothing.
The core's wheel may be shared: what Python and Numba compile of it is then compiled once for all.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parent.parent


def shared_core(tmp_path_factory):
    """A folder with the core as its wheel installs it, one for all processes of a test run."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared-core"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            [wheel] = built(folder.with_name("shared-core-wheel"), ROOT / "packages/emloc")
            made = folder.with_name("shared-core-unfinished")
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
            subprocess.run([*pip, "--target", made, wheel], check=True, capture_output=True)
            made.rename(folder)
    return folder


def built(folder, *packages):
    """Wheels of packages' folders, as pip builds them from a copy."""
    wheels = folder / "wheels"
    for package in packages:
        copied = shutil.copytree(
            package, folder / "sources" / package.name,
            ignore=shutil.ignore_patterns("__pycache__", ".*"),
        )  # fmt: skip
        build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
        subprocess.run([*build, "--wheel-dir", wheels, copied], check=True, capture_output=True)
        shutil.rmtree(copied)
    return sorted(wheels.glob("*.whl"))


class FreshEnvironment:
    """A virtual environment in a folder.

    Attributes:
        bin: folder of its commands.

    Args:
        core: of `shared_core`, instead of a wheel of its own.
    """

    def __init__(self, folder, core=None):
        self.folder, self.bin = folder, folder / "env/bin"
        libraries = folder / "libraries"
        libraries.mkdir(parents=True)
        for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
            ours = entry.name.lower().startswith(("emloc", "__editable__", "_emloc", "pip"))
            if not ours and entry.suffix != ".pth":
                (libraries / entry.name).symlink_to(entry)
        venv.create(folder / "env", with_pip=True, symlinks=True)
        [site] = (folder / "env/lib").glob("python*/site-packages")
        for entry in site.glob("setuptools*"):  # an older one than torch asks for
            shutil.rmtree(entry)
        for name in ("pytest", *(["emloc"] if core else [])):
            command = self.bin / name
            command.write_text(f'#!/bin/sh\nexec {self.bin}/python -m {name} "$@"\n')
            command.chmod(0o755)
        paths = [libraries, *([core] if core else [])]
        (site / "libraries.pth").write_text("".join(f"{path}\n" for path in paths))

    def run(self, *words, where=None, check=True, paths=()):
        """A command of the environment, with no other path to import from than `paths`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PY")}
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        more = {"PATH": path, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        run = subprocess.run(
            list(map(str, words)), cwd=where or self.folder, env={**kept, **more, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert not check or run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
        return run

    def install(self, *packages, needed=True):
        """Wheels of these folders.

        Args:
            needed: whether pip sees that what they need is there.
        """
        how = ["--quiet", "--no-index", *(() if needed else ["--no-deps"])]
        self.run("python", "-m", "pip", "install", *how, *built(self.folder, *packages))
