"""What the recipes of X-VLM's tasks have in common. Imports no torch."""

from dataclasses import dataclass

from vlp_methods.parts import options


@dataclass(frozen=True, kw_only=True)
class Model(options.Encoders):
    """The pre-training model's encoders, and where to start from."""

    weights: options.Start
    """Where to start from."""


@dataclass(frozen=True, kw_only=True)
class ContrastModel(Model):
    """As `Model`, for tasks that keep the space shared by pictures and texts."""

    embed_width: int = 256
    """Width of the shared space, that of pre-training."""
