"""Independent computations that the tests of pruning compare with."""

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


def load(folder, auto=AutoModelForCausalLM):
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def load_vlm(folder):
    return load(folder, AutoModelForImageTextToText)


def gradients(model, batches):
    """Of the summed loss on labelled tokens, by parameter, with all weights loaded at once."""
    model.zero_grad()
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "emloc_patch_mask")}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), reduction="sum"
        ).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def zero_outside(weight, rows=None, columns=None):
    """The weight with all but some rows and columns at zero."""
    mask = torch.zeros_like(weight)
    mask[rows if rows is not None else slice(None)] = 1
    if columns is not None:
        other = torch.zeros_like(weight)
        other[:, columns] = 1
        mask = mask * other
    return weight * mask


def indices(text):
    """`0-3,7` as a list."""
    found = []
    for run in text.split(","):
        first, _, last = run.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
