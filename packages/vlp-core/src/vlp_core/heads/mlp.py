"""Small classifiers on one state."""

from typing import Literal

from torch import nn

ClassHead = Literal["mlp", "relu"]
"""Which small classifier a model has: `mlp_head` or `relu_head`."""


def mlp_head(width: int, classes: int) -> nn.Sequential:
    """Linear to twice the width, layer norm, GELU, linear to `classes` (X-VLM `build_mlp`; default PyTorch
    initial values)."""
    return nn.Sequential(
        nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, classes)
    )


def relu_head(width: int, classes: int) -> nn.Sequential:
    """Linear, ReLU, linear to `classes` (ALBEF and ViCHA `cls_head`; default PyTorch initial values)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


def class_head(kind: ClassHead, width: int, classes: int) -> nn.Sequential:
    """The classifier of that name.

    Raises:
        ValueError: A name that is not known.
    """
    match kind:
        case "mlp":
            return mlp_head(width, classes)
        case "relu":
            return relu_head(width, classes)
    raise ValueError(f"head={kind!r} is not known; choose mlp or relu")
