"""Original InternVL checkpoints of OpenGVLab, seen as transformers' own `InternVLForConditionalGeneration`.

They are written for code that lies beside the weights. None of it is run: config, tensors and
processor are translated.
"""

from pathlib import Path
from typing import Any

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.json_files import read_json
from emloc.artefacts.schema import conforming
from emloc.artefacts.translated import TranslatedCheckpoint
from emloc.errors import CheckpointError, DependencyError
from emloc.machine.progress import warn
from emloc_vlm.image_only import image_only
from emloc_vlm.internvl_chat_config import (
    IMAGE_TOKEN,
    SEPARATORS,
    TEMPLATE,
    has_original_processor,
    is_internvl_chat,
    native_config,
)
from emloc_vlm.internvl_chat_schema import AddedTokens, TokenizerConfig, TokenizerFile
from emloc_vlm.internvl_chat_tensors import layout_rule, tensor_names
from emloc_vlm.shared_tiles import sharing_tiles, with_shares

__all__ = [
    "added_tokens",
    "has_original_processor",
    "is_internvl_chat",
    "native_config",
    "native_processor",
    "native_view",
]

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The template of InternVL 2.5 and 3, without the system message that their code puts first."""


def _chat_template(name: str, path: Path) -> str:
    """The template that a config names, or the one of now where it is not known, which is said."""
    if name not in SEPARATORS:
        warn(
            f"{path / 'config.json'} names the chat template {name!r}, which is not known here; chats are "
            f"written as InternVL 2.5 has them"
        )
    return CHAT_TEMPLATE.replace(SEPARATORS[TEMPLATE], SEPARATORS.get(name, SEPARATORS[TEMPLATE]))


IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": IMAGE_TOKEN,
    "video_token": "<video>",  # required, and added behind the vocabulary as in -hf checkpoints
}
"""Image tokens by the attributes of the tokenizer that `InternVLProcessor` reads."""


def native_view(checkpoint: Checkpoint) -> TranslatedCheckpoint:
    """An original checkpoint as one of transformers' `InternVLForConditionalGeneration`.

    Raises:
        CheckpointError: transformers' model cannot be this one, or tensors are missing or unknown.
    """
    config = native_config(checkpoint.config, added_tokens(checkpoint.path).get(IMAGE_TOKEN))
    text = config["text_config"]
    names = tensor_names(config, checkpoint.config["llm_config"]["model_type"] == "internlm2")
    for stored in sorted(names.keys() - checkpoint.tensors.keys()):
        if not (names[stored] == ("lm_head.weight",) and text["tie_word_embeddings"]):
            raise CheckpointError(
                f"Checkpoint {checkpoint.name} holds no tensor {stored}, which its config.json implies; "
                f"download the checkpoint again."
            )
    return TranslatedCheckpoint(checkpoint, config, layout_rule(names, text))


def added_tokens(path: Path) -> dict[str, int]:
    """Ids of the tokens that were added to a folder's vocabulary, as far as its files tell."""
    ids: dict[str, int] = {}
    if (path / "added_tokens.json").is_file():
        file = path / "added_tokens.json"
        ids.update(conforming(AddedTokens, {"tokens": read_json(file)}, file).tokens)
    if (path / "tokenizer.json").is_file():
        file = path / "tokenizer.json"
        listed = conforming(TokenizerFile, read_json(file), file).added_tokens
        ids.update({token.content: token.id for token in listed})
    if (path / "tokenizer_config.json").is_file():
        file = path / "tokenizer_config.json"
        decoder = conforming(TokenizerConfig, read_json(file), file).added_tokens_decoder
        ids.update({token.content: int(index) for index, token in decoder.items()})
    return ids


def native_processor(path: Path) -> Any:
    """transformers' `InternVLProcessor`, for a folder with the processor files of an original checkpoint.

    Images are cut into tiles and normalised as OpenGVLab's code does it; neither torchvision nor remote
    code is needed. Videos are not read.

    Raises:
        CheckpointError: the tokenizer cannot be read, or the processor cannot do what the config asks.
        DependencyError: the tokenizer is a sentencepiece model and sentencepiece is not installed.
    """
    from transformers import GotOcr2ImageProcessorPil, InternVLProcessor

    config = read_json(path / "config.json")
    if is_internvl_chat(config):
        config = native_config(config, added_tokens(path).get(IMAGE_TOKEN))
    tiles = config["max_dynamic_patch"] if config["dynamic_image_size"] else 1
    if tiles > 1 and not config["use_thumbnail"]:
        raise CheckpointError(
            f"{path / 'config.json'} asks for tiles without a thumbnail, which transformers' processor "
            f"cannot do; set use_thumbnail or unset dynamic_image_size there."
        )
    stored = path / "preprocessor_config.json"
    normalised = read_json(stored) if stored.is_file() else {}
    images = with_shares(GotOcr2ImageProcessorPil)(
        size={"height": config["force_image_size"], "width": config["force_image_size"]},
        image_mean=normalised.get("image_mean", IMAGENET_MEAN),
        image_std=normalised.get("image_std", IMAGENET_STD),
        crop_to_patches=tiles > 1,
        min_patches=config["min_dynamic_patch"],
        max_patches=tiles,  # 1 also where callers ask for cropping
    )
    tokenizer = _tokenizer(path)
    tokenizer.chat_template = template = _chat_template(config.get("template", TEMPLATE), path)
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        # Moved into the template, so that a chat begins with it once, however it is encoded.
        tokenizer.add_bos_token = False
        tokenizer.chat_template = "{{ bos_token }}" + template
    return sharing_tiles(image_only(InternVLProcessor))(
        image_processor=images,
        tokenizer=tokenizer,
        image_seq_length=config["image_seq_length"],
        chat_template=tokenizer.chat_template,
    )


def _tokenizer(path: Path) -> Any:
    """The tokenizer with the attributes that `InternVLProcessor` reads."""
    from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

    tokens: dict[str, Any] = dict(IMAGE_TOKENS)
    stored = path / "tokenizer_config.json"
    about = read_json(stored) if stored.is_file() else {}
    # The class of InternLM2's tokenizer is remote code; transformers converts its sentencepiece model.
    internlm2 = str(about.get("tokenizer_class", "")).startswith("InternLM2")
    kind: Any = PreTrainedTokenizerFast if internlm2 else AutoTokenizer
    if not internlm2:  # an empty configuration, or config.json would be read for what it is not
        tokens["config"] = PreTrainedConfig()
    convert = internlm2 and not (path / "tokenizer.json").is_file()
    sentencepiece = _sentencepiece(path) if convert else None
    if convert:
        tokens["add_bos_token"] = about.get("add_bos_token", True)
    try:
        tokenizer = kind.from_pretrained(path, trust_remote_code=False, **tokens)
        if sentencepiece is not None:
            model = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
            if tokenizer.encode("user", add_special_tokens=False) != model.encode("user"):
                raise ValueError("it marks the beginnings of words in an unknown way")
    except Exception as problem:  # whatever a broken file makes three libraries raise
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else "no message"
        raise CheckpointError(
            f"The tokenizer of {path} cannot be read ({type(problem).__name__}: {first}); download its "
            f"files again."
        ) from problem
    known = {"<img>": None, "</img>": None, IMAGE_TOKEN: None, **added_tokens(path)}
    for token, index in known.items():
        if tokenizer.convert_tokens_to_ids(token) != index:
            raise CheckpointError(
                f"The tokenizer of {path} gives {token} a different id than the one the model was trained "
                f"with; download its files again."
            )
    return tokenizer


def _sentencepiece(path: Path) -> Any:
    """The package, which transformers converts with."""
    try:  # imported to know that they can be: an installed one may be broken
        import google.protobuf  # noqa: F401
        import sentencepiece
    except ImportError as problem:
        raise DependencyError(
            f"The tokenizer of {path} is a sentencepiece model; pip install 'emloc-vlm[sentencepiece]'."
        ) from problem
    return sentencepiece
