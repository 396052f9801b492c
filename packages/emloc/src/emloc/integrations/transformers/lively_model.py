"""Random models whose activations vary as trained ones do. For examples, tests and benchmarks."""

from typing import Any

import torch


def lively_model(auto_class: Any, config: Any, seed: int) -> Any:
    """A float32 model of `config` with seeded weights, larger than the usual initial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Larger than the usual 0.02: activations, and so the tests, should be lively.
                if parameter.ndim == 2:
                    parameter.normal_(0, parameter.shape[1] ** -0.5)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.5)
            named = dict(model.named_parameters(remove_duplicate=False))
            for (
                name,
                stored,
            ) in model.state_dict().items():  # buffers that a model stores are learnt as well
                if name not in named and stored.is_floating_point():
                    stored.uniform_(0.5, 1.5)
    return model
