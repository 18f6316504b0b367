"""Backbones, heads, losses, assembled models and checkpoint conversion for vision-language pre-training.

Submodules are imported when first used: `vlp_core.recipe` does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlp_core import (
        distributed,
        explain,
        heads,
        losses,
        models,
        optim,
        recipe,
        schedule,
        text,
        vision,
        weights,
    )

__version__ = "0.1.0"

__all__ = [
    "distributed",
    "explain",
    "heads",
    "losses",
    "models",
    "optim",
    "recipe",
    "schedule",
    "text",
    "vision",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
