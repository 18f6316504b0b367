"""Small classifier on one state."""

from torch import nn


def mlp_head(width: int, classes: int) -> nn.Sequential:
    """Linear to twice the width, layer norm, GELU, linear to `classes` (X-VLM `build_mlp`; default PyTorch initial values)."""
    return nn.Sequential(
        nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, classes)
    )
