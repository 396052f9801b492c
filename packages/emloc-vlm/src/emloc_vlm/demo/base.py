"""The demo's base model: a small InternVL, trained from nothing on the questions that it shall know.

As large ones are made: the vision tower learns first, to see shapes and colours, through a head that
is thrown away; then the language model learns to answer over what the tower sees, and is asked about
shapes only. Two minutes on two cores, kept in the user's cache under a digest of what shapes it.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from emloc.artefacts.cache import cache_folder
from emloc.artefacts.durable import sync_tree
from emloc.demos.easy_vqa import WHEEL_SHA256, WORDS, Question, easy_vqa, questions
from emloc.machine.progress import progress_bar
from emloc_vlm.demo.small_internvl import (
    IMAGE_TOKENS_PER_TILE,
    Shape,
    small_model,
    small_processor,
)
from emloc_vlm.images import ImageRef

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Recipe:
    """The settings by which the base is built and trained."""

    shape: Shape = field(default_factory=Shape)
    vision_steps: int = 400
    steps: int = 600
    batch: int = 64
    learning_rate: float = 1e-3
    seed: int = 0


def trained_base(recipe: Recipe | None = None) -> Path:
    """The model's folder, trained on first use.

    Raises:
        CheckpointError: easy-VQA cannot be had.
    """
    recipe = recipe or Recipe()
    identity = json.dumps({**asdict(recipe), "data": WHEEL_SHA256, "format": 5}, sort_keys=True)
    name = f"easy-vqa-internvl-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    target = cache_folder() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
                _train(recipe, Path(temporary) / "model")
                sync_tree(Path(temporary) / "model")
                (Path(temporary) / "model").rename(target)
    return target


def _train(recipe: Recipe, folder: Path) -> None:
    asked = questions(easy_vqa(), "train")
    processor = small_processor(text for q in asked for text in (q.text, q.answer))
    paths = sorted({q.image for q in asked})
    pictures = processor.image_processor(
        [ImageRef(path, str(path)).open() for path in paths], return_tensors="pt"
    )["pixel_values"]
    number = {path: index for index, path in enumerate(paths)}
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = small_model(recipe.shape, processor).train()
        _teach_to_see(model, pictures, _facts(asked, number), recipe)
        _teach_to_answer(
            model, processor, pictures, [q for q in asked if q.about_shape], number, recipe
        )
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def _facts(asked: Sequence[Question], number: dict[Path, int]) -> Tensor:
    """The answers about every picture, `pictures × words`: 1 shown, 0 not, NaN not said."""
    facts = torch.full((len(number), len(WORDS)), math.nan)
    for question in asked:
        word, shown = question.fact
        facts[number[question.image], WORDS.index(word)] = float(shown)
    return facts


def _teach_to_see(model: Any, pictures: Tensor, facts: Tensor, recipe: Recipe) -> None:
    """Tower and projector, under a linear head on the mean image token, one logit per word."""
    head = torch.nn.Linear(model.config.text_config.hidden_size, len(WORDS))
    draw = torch.Generator().manual_seed(recipe.seed)

    def loss() -> Tensor:
        chosen = torch.randint(len(pictures), (recipe.batch,), generator=draw)
        logits, said = head(_seen(model, pictures[chosen]).mean(1)), facts[chosen]
        known = ~said.isnan()
        return torch.nn.functional.binary_cross_entropy_with_logits(logits[known], said[known])

    towers = (model.model.vision_tower, model.model.multi_modal_projector, head)
    _fit(
        "vision tower", loss, [p for part in towers for p in part.parameters()],
        recipe.vision_steps, recipe.learning_rate,
    )  # fmt: skip


def _teach_to_answer(
    model: Any,
    processor: Any,
    pictures: Tensor,
    known: Sequence[Question],
    number: dict[Path, int],
    recipe: Recipe,
) -> None:
    """The language model, over image tokens that no longer change and are made once."""
    with torch.no_grad():
        seen = torch.cat([_seen(model, part) for part in pictures.split(256)])
    # Few: the same questions about many pictures.
    chats = {pair: _chat(*pair, processor) for pair in {(q.text, q.answer) for q in known}}
    draw = torch.Generator().manual_seed(recipe.seed)
    pad = processor.tokenizer.pad_token_id

    def loss() -> Tensor:
        chosen = torch.randint(len(known), (recipe.batch,), generator=draw).tolist()
        rows = [chats[known[i].text, known[i].answer] for i in chosen]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([i + [pad] * (longest - len(i)) for i, _ in rows])
        labels = torch.tensor([ls + [-100] * (longest - len(ls)) for _, ls in rows])
        embeds = model.get_input_embeddings()(ids).masked_scatter(
            (ids == processor.image_token_id)[..., None],
            seen[[number[known[i].image] for i in chosen]],
        )
        return model(inputs_embeds=embeds, attention_mask=(ids != pad).long(), labels=labels).loss

    parts = (model.model.language_model, model.lm_head)
    _fit(
        "language model", loss, [p for part in parts for p in part.parameters()],
        recipe.steps, recipe.learning_rate,
    )  # fmt: skip


def _seen(model: Any, pictures: Tensor) -> Tensor:
    """`pictures × image tokens × width`: what the language model is given."""
    return model.get_image_features(
        pictures, vision_feature_layer=-1, vision_feature_select_strategy="default"
    ).pooler_output


def _fit(
    name: str, loss: Loss, parameters: list[torch.nn.Parameter], steps: int, rate: float
) -> None:
    """AdamW with warm-up and cosine decay."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    with progress_bar(name, steps) as advance:
        for _step in range(steps):
            loss_now = loss()
            loss_now.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(note=f"loss {float(loss_now.detach()):.3f}")


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
