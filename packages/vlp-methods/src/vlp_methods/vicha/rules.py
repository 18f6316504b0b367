"""Which parameters of ViCHA and ALBEF decay. Source: timm 0.4.9 `optim_factory.py` as ALBEF and ViCHA use
it."""

from vlp_core.optim import ParameterRule

# Vectors and biases do not decay, all else does: also the temperature (a single number) and tables of
# embeddings. Class token and mask token are vectors here and tables of one row in the reference, where they
# decay.
NO_DECAY = ParameterRule(pattern=r"(^|\.)bias$|norm\.weight$|^cls_head\.1\.weight$", decay=False)


def parameter_rules() -> list[ParameterRule]:
    """Rules for `vlp_core.optim.parameter_groups`, for every model of ViCHA; all parts learn equally fast."""
    return [NO_DECAY]
