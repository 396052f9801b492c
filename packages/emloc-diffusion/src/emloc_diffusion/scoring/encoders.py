"""The encoders of DreamBooth's scores: DINO's ViT-S/16 and CLIP's ViT-B/32, by name or local folder.

Pictures are prepared with Pillow alone, the same way whichever library has the model and whether or not
torchvision is there, because the resampling moves the scores. For DINO that is what its authors
evaluate with: the shorter side to 8/7 of the model's (256 for 224), bicubic, the centre, ImageNet's mean
and deviation, so transformers' and timm's copies of the same weights give the same scores; a
`preprocessor_config.json` beside them is not asked. CLIP is prepared as its own configuration says.

Only safetensors are read. Nothing is downloaded where `HF_HUB_OFFLINE` is set.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub import constants, snapshot_download
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from emloc.artefacts.json_files import read_json
from emloc.errors import CheckpointError, DataError, DependencyError
from emloc.integrations.pictures import read_picture

ClassToken: TypeAlias = tuple[Callable[[Tensor], Tensor], int]
"""Pixels to class tokens, and the side of the pictures in pixels."""

BATCH = 16
"""Pictures or texts that go through a model at once."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)

SAFETENSORS_REVISIONS = {"openai/clip-vit-base-patch32": "refs/pr/15"}
"""Revisions on the hub with safetensors, for models whose main branch holds pickled weights only."""

LOADING_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError)
"""The errors that the libraries raise on a folder that is damaged or of something else."""

FILES = ("*.json", "*.safetensors", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class DinoEncoder:
    """Embeds pictures as the class token of a DINO vision transformer, after its last norm.

    Attributes:
        name: what it was loaded by.
        class_token: pixels, float32 (n, 3, side, side) on `device`, to the tokens, (n, width).
        prepare: pictures to pixels.
        device: where the model is.
    """

    name: str
    class_token: Callable[[Tensor], Tensor]
    prepare: CLIPImageProcessorPil
    device: str

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings, float32 of shape (pictures, width), on the CPU.

        Raises:
            DataError: no pictures, or something that is none.
        """
        return _in_batches(
            _rgb(images), lambda batch: self.class_token(_pixels(self.prepare, batch, self.device))
        )


@dataclass(frozen=True)
class ClipEncoder:
    """Embeds pictures and texts in CLIP's common space, after the projections.

    Attributes:
        name: what it was loaded by.
        model: transformers' CLIPModel.
        prepare: pictures to pixels.
        tokenizer: texts to tokens.
        device: where the model is.
    """

    name: str
    model: Any
    prepare: CLIPImageProcessorPil
    tokenizer: Any
    device: str

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings, float32 of shape (pictures, width), on the CPU.

        Raises:
            DataError: no pictures, or something that is none.
        """

        def embed(batch: Sequence[Image.Image]) -> Tensor:
            pixels = _pixels(self.prepare, batch, self.device)
            return self.model.get_image_features(pixel_values=pixels).pooler_output

        return _in_batches(_rgb(images), embed)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings, float32 of shape (texts, width), on the CPU; what CLIP cannot hold is cut off.

        Raises:
            DataError: no texts.
        """
        if not texts:
            raise DataError("There are no texts to embed.")

        def embed(batch: Sequence[str]) -> Tensor:
            tokens = self.tokenizer(
                list(batch), padding=True, truncation=True, return_tensors="pt",
                max_length=self.model.config.text_config.max_position_embeddings,
            ).to(self.device)  # fmt: skip
            return self.model.get_text_features(**tokens).pooler_output

        return _in_batches(texts, embed)


def load_dino(name_or_path: str = "facebook/dino-vits16", device: str = "cpu") -> DinoEncoder:
    """A DINO encoder of transformers (ViTModel) or timm.

    Args:
        name_or_path: a hub id, `id@revision`, a local folder of either library, or a model of timm such
            as `vit_small_patch16_224.dino` (the same as `timm/vit_small_patch16_224.dino`).
        device: where the model goes.

    Raises:
        CheckpointError: it cannot be had or loaded, or is no vision transformer with a class token.
        DependencyError: it is timm's, and timm or torchvision, which timm needs, is missing.
    """
    name = name_or_path.removeprefix("hf-hub:").removeprefix("local-dir:")
    # A model of timm without an owner is the one of timm's own account.
    folder = _folder(name if "/" in name or os.path.isdir(name) else f"timm/{name}")
    config = read_json(folder / "config.json")
    if "architecture" in config:
        class_token, side = _timm_class_token(folder, name_or_path, device)
    elif config.get("model_type") == "vit":
        class_token, side = _vit_class_token(folder, name_or_path, device)
    else:
        raise CheckpointError(
            f"{name_or_path} is of type {config.get('model_type')}, not a ViT of transformers or timm; "
            f"pass facebook/dino-vits16, vit_small_patch16_224.dino or a folder of one of them."
        )
    prepare = CLIPImageProcessorPil(
        size={"shortest_edge": round(side * 8 / 7)},
        crop_size={"height": side, "width": side},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_DEVIATION),
    )
    return DinoEncoder(name_or_path, class_token, prepare, device)


def load_clip(
    name_or_path: str = "openai/clip-vit-base-patch32", device: str = "cpu"
) -> ClipEncoder:
    """A CLIP encoder of transformers (CLIPModel).

    Args:
        name_or_path: a hub id, `id@revision`, or a local folder.
        device: where the model goes.

    Raises:
        CheckpointError: it cannot be had or loaded, or is no CLIP.
    """
    folder = _folder(name_or_path)
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise CheckpointError(
            f"{name_or_path} is of type {kind}, not a CLIP model with both encoders; pass "
            f"openai/clip-vit-base-patch32 or a folder of it."
        )
    model = _load(CLIPModel, folder, name_or_path, device)
    try:
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise FileNotFoundError("no tokenizer.json")  # transformers would make an empty one
        # The class that needs Pillow only; transformers would prefer torchvision's where it is there.
        prepare = CLIPImageProcessorPil.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except LOADING_ERRORS as problem:
        raise CheckpointError(
            f"{name_or_path} has no image processor or tokenizer that transformers can read "
            f"({_first_line(problem)}); copy preprocessor_config.json and the tokenizer's files there."
        ) from problem
    return ClipEncoder(name_or_path, model, prepare, tokenizer, device)


def _vit_class_token(folder: Path, name: str, device: str) -> ClassToken:
    model = _load(ViTModel, folder, name, device, add_pooling_layer=False)
    side = model.embeddings.patch_embeddings.image_size[0]
    return lambda pixels: model(pixel_values=pixels).last_hidden_state[:, 0], int(side)


def _timm_class_token(folder: Path, name: str, device: str) -> ClassToken:
    timm = _import_timm()
    if not (folder / "model.safetensors").is_file():  # timm would go on to pickled files
        raise CheckpointError(f"{name} has no model.safetensors; save the timm model with it.")
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    except LOADING_ERRORS as problem:
        raise CheckpointError(f"timm cannot load {name}: {_first_line(problem)}") from problem
    patches = getattr(model, "patch_embed", None)
    if getattr(model, "cls_token", None) is None or not getattr(patches, "img_size", None):
        raise CheckpointError(
            f"{name} is a {type(model).__name__} without a class token at a fixed size; pass a vision "
            f"transformer such as vit_small_patch16_224.dino."
        )
    model = model.to(device, torch.float32).eval()
    return lambda pixels: model.forward_features(pixels)[:, 0], int(model.patch_embed.img_size[0])


def _import_timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as problem:
        missing = (problem.name or "").partition(".")[0]
        if missing == "timm":
            raise DependencyError(
                "This DINO is timm's, which is not installed; pip install 'emloc-diffusion[evaluation]', "
                "or pass facebook/dino-vits16."
            ) from problem
        raise DependencyError(
            f"timm needs {missing or 'a package'}, which cannot be imported ({_first_line(problem)}); "
            f"install the {missing or 'package'} that fits this torch ({torch.__version__}), or pass "
            f"facebook/dino-vits16."
        ) from problem
    except RuntimeError as problem:  # torchvision's operators, built for another torch
        raise DependencyError(
            f"timm cannot be imported ({_first_line(problem)}); install the torchvision that fits this "
            f"torch ({torch.__version__}), or pass facebook/dino-vits16."
        ) from problem


def _load(kind: Any, folder: Path, name: str, device: str, **options: Any) -> Any:
    """A model of transformers in float32, with every weight from the folder."""
    try:
        model, report = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
            trust_remote_code=False, **options,
        )  # fmt: skip
    except LOADING_ERRORS as problem:
        raise CheckpointError(f"{name} cannot be loaded: {_first_line(problem)}") from problem
    # transformers makes up weights that it does not find: scores of those would look like any other.
    absent = sorted(report["missing_keys"])
    if absent:
        raise CheckpointError(
            f"{name} lacks weights of {kind.__name__}: {absent[0]} and the like, {len(absent)} in all; "
            f"is it another model's folder?"
        )
    return model.to(device).eval()


def _folder(name: str) -> Path:
    """The local folder of a path or hub id, with safetensors in it."""
    if os.path.isdir(name):
        folder = Path(name)
        if not any(folder.glob("*.safetensors")):
            raise CheckpointError(
                f"{name} has no safetensors, and pickled weights are not read; save the model there "
                f"with save_pretrained."
            )
        return folder
    repository, _, revision = name.partition("@")
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise CheckpointError(f"No folder {name}; pass a local folder or a hub id.")
    known = SAFETENSORS_REVISIONS.get(repository)
    for wanted in [revision] if revision else ["main", *([known] if known else [])]:
        folder = _snapshot(repository, wanted)
        if any(folder.glob("*.safetensors")):
            return folder
    raise CheckpointError(
        f"{name} on the hub has no safetensors{' here' if _offline() else ''}, and pickled weights are "
        f"not read; pass {repository}@REVISION of one that has them, a folder with model.safetensors, or "
        f"timm/vit_small_patch16_224.dino if it is for DINO."
    )


def _snapshot(repository: str, revision: str) -> Path:
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(FILES),
                local_files_only=_offline(),
            )
        )
    except Exception as problem:  # the hub's many errors all mean: not to be had
        raise CheckpointError(
            f"No folder {repository}, and the hub did not provide it at {revision} "
            f"({type(problem).__name__}: {_first_line(problem)}); check the name, the network, "
            f"HF_HUB_OFFLINE and HF_TOKEN, or pass a local folder."
        ) from problem


def _offline() -> bool:
    # The hub's library reads the variable once; it may have been set since.
    said = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return said or constants.HF_HUB_OFFLINE


def _rgb(images: Sequence[Image.Image]) -> Sequence[Image.Image]:
    if not images:
        raise DataError("There are no pictures to embed.")
    for place, image in enumerate(images):
        if not isinstance(image, Image.Image):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DataError(
                f"Picture {place} is a {type(image).__name__}; open it with PIL.Image.open first."
            )
    return [
        read_picture(image, f"Picture {place}", "leave it out")
        for place, image in enumerate(images)
    ]


def _pixels(prepare: Any, images: Sequence[Image.Image], device: str) -> Tensor:
    return prepare(list(images), return_tensors="pt")["pixel_values"].to(device, torch.float32)


def _in_batches(items: Sequence[Any], embed: Callable[[Sequence[Any]], Tensor]) -> Tensor:
    with torch.no_grad():
        starts = range(0, len(items), BATCH)
        parts = [embed(items[start : start + BATCH]).float().cpu() for start in starts]
    return torch.cat(parts)


def _first_line(problem: BaseException) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)
