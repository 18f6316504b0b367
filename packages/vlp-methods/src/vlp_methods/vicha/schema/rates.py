"""A rule of every recipe of ViCHA. Imports no torch."""

from dataclasses import dataclass

from vlp_methods.engine.options import Training


@dataclass(frozen=True, kw_only=True)
class OneRate(Training):
    """All parts of ViCHA learn at one rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer.lr_scale != 1:
            raise ValueError(
                f"optimizer.lr_scale={self.optimizer.lr_scale}: no part of ViCHA learns faster than the "
                "others; leave it at 1"
            )
