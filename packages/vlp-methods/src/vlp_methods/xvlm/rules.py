"""Which parameters of X-VLM decay, and which learn faster. Source: X-VLM `optim.py` and the `init_params` of
its models."""

from torch import nn
from vlp_core.models.fusion.nlvr import NlvrModel
from vlp_core.models.fusion.vqa import VqaModel
from vlp_core.models.xvlm.model import Xvlm
from vlp_core.optim import ParameterRule

from vlp_methods.engine.options import Training

# Biases and norms do not decay. Kept from the reference: "bias" also stands in the name of Swin's position
# tables (no decay), and the norms inside the MLP heads are called by number (decay).
NO_DECAY = ParameterRule(pattern=r"bias|norm\.weight$", decay=False)


def parameter_rules(
    model: nn.Module, *, fresh_lr_scale: float = 2.0, as_released: bool = True
) -> list[ParameterRule]:
    """Rules for `vlp_core.optim.parameter_groups`.

    Args:
        model: `Xvlm`, `NlvrModel`, `VqaModel` or `CaptionModel`.
        fresh_lr_scale: Factor on the learning rate of what starts without pre-trained values:
            cross-attention, projections, temperature and heads in pre-training; the answer decoder's keys and
            values of VQA where they could not be copied; the class head of NLVR2.
        as_released: The released multi-GPU NLVR2 fine-tuning does not scale its class head, because the
            optimizer is made from a wrapper that hides the names; False scales it as the code intends.
    """
    match model:
        case Xvlm() if "masked_language" in model.heads:
            fresh = r"\.cross|^(vision_proj|text_proj|temperature|itm_head|bbox_head)\b"
        case VqaModel() if model.decoder.image_width != model.text.image_width:
            fresh = r"^decoder\..*\.cross\.key_value\."
        case NlvrModel(stage="domain"):
            fresh = r"^ta_head\."
        case NlvrModel() if not as_released:
            fresh = r"^cls_head\."
        case _:
            return [NO_DECAY]
    return [NO_DECAY, ParameterRule(pattern=fresh, lr_scale=fresh_lr_scale)]


def fine_tuning_rules(recipe: Training, model: nn.Module) -> list[ParameterRule]:
    """Rules of the optimizer's parameter groups; `optimizer.lr_scale` holds for the parts of `model` that
    pre-training has no values for.

    Raises:
        ValueError: There is no such part, so the factor could not take effect.
    """
    scale = recipe.optimizer.lr_scale
    found = parameter_rules(model, fresh_lr_scale=scale, as_released=False)
    if scale != 1 and all(rule.lr_scale is None for rule in found):
        raise ValueError(
            f"optimizer.lr_scale={scale}: no part of the model of task {recipe.task} starts without "
            "pre-trained values; leave it at 1"
        )
    return found
