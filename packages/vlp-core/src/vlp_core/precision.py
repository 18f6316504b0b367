"""Numbers of losses are at least fp32."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is in float64: what losses compute in, whatever the precision of the model."""
    return x if x.dtype == torch.float64 else x.float()
