"""The demo's base model: a small InternVL, trained from nothing on the questions that it shall know.

transformers' own class and processor; a vision tower and a Qwen2 of a few layers each, one tile per
picture, one token per word. Training takes some minutes on two cores and is kept in the user's cache,
under a digest of everything that shapes it.
"""

import hashlib
import json
import math
import shutil
import string
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    InternVLProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from emloc.demos.wheel import cache_folder
from emloc.progress import progress_bar
from emloc_vlm.demo.easy_vqa import SHAPES, WHEEL_SHA256, Question, easy_vqa, questions
from emloc_vlm.internvl_chat import CHAT_TEMPLATE, IMAGE_TOKENS
from emloc_vlm.processor import image_only

PIXELS = 64
PATCH = 8
IMAGE_TOKENS_PER_TILE = (PIXELS // PATCH // 2) ** 2


@dataclass(frozen=True)
class Recipe:
    """How the base is built and trained."""

    vision_width: int = 96
    vision_layers: int = 3
    width: int = 128
    layers: int = 3
    steps: int = 1200
    batch: int = 64
    learning_rate: float = 1e-3
    seed: int = 0


def trained_base(recipe: Recipe | None = None) -> Path:
    """The model's folder, trained on first use.

    Raises:
        CheckpointError: easy-VQA cannot be had.
    """
    recipe = recipe or Recipe()
    identity = json.dumps({**asdict(recipe), "data": WHEEL_SHA256, "format": 4}, sort_keys=True)
    name = f"easy-vqa-internvl-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    target = cache_folder() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
                _train(recipe, Path(temporary) / "model")
                shutil.move(str(Path(temporary) / "model"), target)
    return target


def _train(recipe: Recipe, folder: Path) -> None:
    known = [q for q in questions(easy_vqa(), "train") if not q.names_a_shape]
    everything = questions(easy_vqa(), "train")
    processor = _processor(everything)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = _model(recipe, processor)
        _fit(model, processor, known, recipe)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _processor(chosen: Sequence[Question]) -> Any:
    """One token per word of the questions and answers; other words are spelt."""
    words = sorted({word for q in chosen for word in [*_words(q.text), q.answer]})
    tokens = ["<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS.values()]
    letters = [c for c in string.printable if not c.isspace()]
    spelt = [*letters, *(f"##{c}" for c in letters)]
    known = dict.fromkeys([*tokens, "\n", "user", "assistant", *words, *spelt])
    vocabulary = {word: index for index, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<|unk|>"))
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    # Words, marks and line ends; blanks between them are not tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        **IMAGE_TOKENS,
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return image_only(
        InternVLProcessor,
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": PIXELS, "width": PIXELS}, crop_to_patches=True, min_patches=1,
            max_patches=1,
            # The pictures are nearly white: what differs from that should be what stands out.
            image_mean=[0.95] * 3, image_std=[0.2] * 3,
        ),
        tokenizer=fast,
        image_seq_length=IMAGE_TOKENS_PER_TILE,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def _words(text: str) -> list[str]:
    return text.replace("?", " ?").split()


def _model(recipe: Recipe, processor: Any) -> Any:
    tokenizer = processor.tokenizer
    config = InternVLConfig(
        vision_config={
            "hidden_size": recipe.vision_width, "intermediate_size": 4 * recipe.vision_width,
            "num_hidden_layers": recipe.vision_layers, "num_attention_heads": 4,
            "image_size": [PIXELS, PIXELS], "patch_size": [PATCH, PATCH], "attention_bias": True,
            "layer_scale_init_value": 1.0,
        },
        text_config={
            "model_type": "qwen2", "hidden_size": recipe.width,
            "intermediate_size": 3 * recipe.width, "num_hidden_layers": recipe.layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
            "max_position_embeddings": 256, "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
        },
        image_token_id=processor.image_token_id,
        image_seq_length=IMAGE_TOKENS_PER_TILE,
        tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    # transformers' usual initial 0.02 is for wide models; at this width signals would fade.
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif "position_embeddings" in name or "cls_token" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def _fit(model: Any, processor: Any, known: Sequence[Question], recipe: Recipe) -> None:
    """AdamW with warm-up and cosine decay; every picture is prepared once."""
    paths = sorted({q.image for q in known})
    index = {path: number for number, path in enumerate(paths)}
    pictures = processor.image_processor(
        [Image.open(path).convert("RGB") for path in paths], return_tensors="pt"
    )["pixel_values"]
    asked = {(q.text, q.answer) for q in known}  # few: the same questions about many pictures
    encoded = {pair: _chat(*pair, processor) for pair in sorted(asked)}
    chats = [encoded[q.text, q.answer] for q in known]
    # Whether it is a circle is harder to see than whether it is red, and asked about less often.
    weights = torch.tensor([4.0 if _about_shape(q) else 1.0 for q in known])
    draw = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe.steps))
    pad = processor.tokenizer.pad_token_id
    model.train()
    with progress_bar("base model", recipe.steps) as advance:
        for _step in range(recipe.steps):
            chosen = torch.multinomial(weights, recipe.batch, generator=draw).tolist()
            rows = [chats[i] for i in chosen]
            longest = max(len(ids) for ids, _ in rows)
            ids = torch.tensor([i + [pad] * (longest - len(i)) for i, _ in rows])
            labels = torch.tensor([ls + [-100] * (longest - len(ls)) for _, ls in rows])
            loss = model(
                input_ids=ids,
                attention_mask=(ids != pad).long(),
                pixel_values=_turned(pictures[[index[known[i].image] for i in chosen]], draw),
                labels=labels,
            ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(note=f"loss {float(loss.detach()):.3f}")
    model.eval()


def _turned(pictures: Tensor, draw: torch.Generator) -> Tensor:
    """Mirrored and turned by chance, each as a whole: no answer changes, and four thousand pictures
    become more."""
    chances = torch.rand(3, len(pictures), 1, 1, 1, generator=draw) < 0.5
    pictures = torch.where(chances[0], pictures.flip(-1), pictures)
    pictures = torch.where(chances[1], pictures.flip(-2), pictures)
    return torch.where(chances[2], pictures.transpose(-1, -2), pictures)


def _about_shape(question: Question) -> bool:
    return any(shape in question.text for shape in SHAPES) and question.answer in ("yes", "no")


def _rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / (0.05 * steps))
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def _chat(question: str, answer: str, processor: Any) -> tuple[list[int], list[int]]:
    """Token ids and labels, as the processor and `collate` would make them."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    start, context, end = (processor.tokenizer.convert_tokens_to_ids(t) for t in _AROUND)
    prompt: list[int] = []
    for token in processor.tokenizer(text, add_special_tokens=False)["input_ids"]:
        prompt += [start, *[context] * IMAGE_TOKENS_PER_TILE, end] if token == context else [token]
    ending = processor.tokenizer(answer + "<|im_end|>\n", add_special_tokens=False)
    answered = list(ending["input_ids"])
    return prompt + answered, [-100] * len(prompt) + answered


_AROUND = ("<img>", "<IMG_CONTEXT>", "</img>")
