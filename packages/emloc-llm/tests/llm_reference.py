"""Independent computations that the tests compare with; they share no code with the product."""

import torch
from transformers import AutoModelForCausalLM


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def layer_inputs(model, batches, names):
    """What each layer reads on the unpadded tokens, in float64."""
    seen = {name: [] for name in names}
    mask = None

    def hook(name):
        def record(module, inputs):
            seen[name].append(inputs[0][mask].double())

        return record

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    for batch in batches:
        mask = batch["attention_mask"].bool()
        logits(model, {k: batch[k] for k in ("input_ids", "attention_mask")})
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def best_error(weight, x, rank):
    """‖(W − W_k) Xᵀ‖ of the best rank-k W_k: the tail of the singular values of W Xᵀ."""
    return torch.linalg.svdvals(weight.double() @ x.T)[rank:].norm()
