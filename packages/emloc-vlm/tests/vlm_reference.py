"""Independent computations that the tests compare with; they share no code with the product."""

import torch
from transformers import AutoModelForImageTextToText


def load(folder, dtype=torch.float32):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    return model.eval().requires_grad_(False)


def logits(model, batch):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        return model(**inputs).logits


def outputs_and_inputs(model, batches, names):
    """What each layer reads in float64, padded text tokens left out."""
    seen = {name: [] for name in names}
    mask = None

    def hook(name):
        def record(module, inputs):
            x = inputs[0].double()
            seen[name].append(x.flatten(0, -2) if "vis" in name else x[mask])

        return record

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    for batch in batches:
        mask = batch["attention_mask"].bool()
        logits(model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def best_error(weight, x, rank):
    """‖(W − W_k) Xᵀ‖ of the best rank-k W_k: the tail of the singular values of W Xᵀ."""
    return torch.linalg.svdvals(weight.double() @ x.T)[rank:].norm()
