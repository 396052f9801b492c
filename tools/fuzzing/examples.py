"""Valid folders of every kind, written once per run: models, an emulator, adapters, data."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import emloc
from emloc.extend.plugins import load_plugins
from emloc.machine.progress import console


class Examples:
    """What the parsers' folders are copied from, below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        families = load_plugins().families
        self.options = {}
        with contextlib.redirect_stderr(io.StringIO()), console.capture():
            for name in ("llm", "vlm", "diffusion"):
                self.options[name] = dict(families[name].load().write_example(root / name, 0))
            self._stages()

    def _stages(self):
        folder, given = self.root / "llm", self.options["llm"]
        data = {key: value for key, value in given.items() if key != "model_name_or_path"}
        emloc.compress(output_dir=folder / "emulator", num_calibration_samples=4, **given)
        _write_adapter(Path(given["model_name_or_path"]), folder / "adapter")
        self.data = data

    def model(self, family: str) -> Path:
        """A model's folder."""
        return Path(self.options[family]["model_name_or_path"])

    def copy(self, source: Path, name: str) -> Path:
        """A copy for a parser to edit; large files are linked."""
        target = self.root / "parsers" / name
        for path in sorted(source.rglob("*")):
            if path.is_file():
                copied = target / path.relative_to(source)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copied)
        return target

    def empty(self, name: str) -> Path:
        """A folder with nothing in it."""
        folder = self.root / "parsers" / name
        folder.mkdir(parents=True)
        return folder


def document(path: Path):
    """A JSON file's content; a mark of UTF-8 before it is none."""
    return json.loads(path.read_text("utf-8-sig"))


def _write_adapter(model: Path, folder: Path) -> None:
    """A LoRA of PEFT's, with patterns of ranks and alphas."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 4},
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(model)
    get_peft_model(base, config).save_pretrained(folder)
