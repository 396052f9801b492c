"""Is a tensor free of NaN and infinity? In one pass, without a temporary of its size."""

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """NaN and infinity both show in the extremes: NaN propagates, infinity is one."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
