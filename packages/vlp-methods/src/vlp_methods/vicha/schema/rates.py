"""A rule of every recipe of ViCHA. Imports no torch."""

from vlp_methods.engine.options import Training


def one_rate(recipe: Training) -> None:
    """All parts of ViCHA learn at one rate."""
    if recipe.optimizer.lr_scale != 1:
        raise ValueError(
            f"optimizer.lr_scale={recipe.optimizer.lr_scale}: no part of ViCHA learns faster than the others; leave it at 1"
        )
