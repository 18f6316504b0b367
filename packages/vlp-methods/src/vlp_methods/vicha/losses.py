"""Losses of ViCHA from the output of its model and teacher; the one place where its features cross ranks.

Source: arXiv 2208.13628 section 3; ALBEF, arXiv 2107.07651 section 3.2 and 3.3.

Shape letters: B pairs of this rank, G of all ranks, Q queue, E shared embedding, H levels.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import vlp_ops
from torch import Tensor
from vlp_core import distributed
from vlp_core.losses import (
    distilled_cross_entropy,
    masked_image_loss,
    matching_loss,
    momentum_targets,
)
from vlp_core.losses.masked_language import IGNORED
from vlp_core.models.fusion.model import PairStates
from vlp_core.models.vicha.model import Pairs, Predicted, PredictedPatches, Taught
from vlp_core.momentum import FeatureQueue

HiddenTargets = Literal["own", "as_released"]


ORDER = ("itc", "itm", "mlm", "hidden", "mim")
"""The losses of pre-training in the order in which they are reported."""


def pretrain_losses(
    pairs: Pairs,
    taught: Taught,
    temperature: Tensor,
    queue: FeatureQueue,
    *,
    alpha: float = 0.4,
    level_weights: Sequence[float] = (),
    hidden_weight: float = 0.1,
    hidden_targets: HiddenTargets = "own",
    masked_image_weight: float = 1.0,
) -> dict[str, Tensor]:
    """`itc`, `itm`, `mlm`, and where the model has them `hidden` (hierarchy) and `mim`. Puts the teacher's
    features into the queue.

    Args:
        pairs: Of `Vicha.pretrain`.
        taught: Of the teacher's `Vicha.teach`, for the same batch.
        temperature: Of the model.
        queue: Features of earlier batches, the same on all ranks.
        alpha: Weight of the teacher in the targets of `itc` and `mlm`.
        level_weights: One for each level of the hierarchy, lowest first; () is 1 for all.
        hidden_weight: Weight of their weighted sum.
        hidden_targets: See `hidden_loss`.
        masked_image_weight: Weight of `mim` (`mae_lambda`).
    """
    levels = None
    if pairs.hidden_image is not None and pairs.hidden_text is not None:
        levels = Levels(pairs.hidden_image, pairs.hidden_text)
    losses = feature_losses(
        pairs,
        taught,
        temperature,
        queue,
        levels,
        alpha=alpha,
        level_weights=level_weights,
        hidden_weight=hidden_weight,
        hidden_targets=hidden_targets,
    )
    losses |= fusion_losses(pairs, taught, alpha=alpha, masked_image_weight=masked_image_weight)
    return {name: losses[name] for name in ORDER if name in losses}


def retrieval_losses(
    pairs: Pairs,
    taught: Taught,
    temperature: Tensor,
    queue: FeatureQueue,
    *,
    identities_B: Tensor,
    alpha: float = 0.4,
) -> dict[str, Tensor]:
    """`itc` and `itm` of retrieval fine-tuning: pairs of equal identity, in batch and queue, are positives of
    each other.

    Puts the teacher's features and the identities into the queue. `alpha` 0 learns from identities alone.
    """
    return {
        **feature_losses(pairs, taught, temperature, queue, alpha=alpha, identities_B=identities_B),
        "itm": matching_loss(pairs.match_logits, len(pairs.text_embeds)),
    }


class Levels(NamedTuple):
    """Features of lower blocks and layers, [H, B, E] each, lowest first."""

    image: Tensor
    text: Tensor


def feature_losses(
    pairs: Pairs | PairStates,
    taught: Taught,
    temperature: Tensor,
    queue: FeatureQueue,
    levels: Levels | None = None,
    *,
    alpha: float = 0.4,
    identities_B: Tensor | None = None,
    level_weights: Sequence[float] = (),
    hidden_weight: float = 0.1,
    hidden_targets: HiddenTargets = "own",
) -> dict[str, Tensor]:
    """`itc`, and `hidden` where there are levels: the losses that compare all pairs of a batch. Puts the
    teacher's features (and the identities) into the queue. Arguments as in `pretrain_losses` and
    `retrieval_losses`."""
    gathered = _gather(levels, taught)
    losses = {
        "itc": momentum_contrastive_loss(
            pairs, taught, temperature, queue, alpha=alpha, identities_B=identities_B
        )
    }
    if levels is not None:
        count = len(levels.image)
        each = hidden_loss(
            levels.image,
            levels.text,
            gathered[2 : 2 + count],
            gathered[2 + count :],
            temperature,
            first=distributed.rank() * levels.image.shape[1],
            targets=hidden_targets,
        )
        weights = torch.tensor(list(level_weights) or [1.0] * count, device=each.device)
        if len(weights) != count:
            raise ValueError(f"{len(weights)} level_weights for {count} levels; give one for each")
        losses["hidden"] = hidden_weight * (weights * each).sum()
    ids = None if identities_B is None else distributed.gather(identities_B, "none")
    queue.put(gathered[0], gathered[1], ids)
    return losses


def fusion_losses(
    predicted: Pairs | Predicted, taught: Taught, *, alpha: float = 0.4, masked_image_weight: float = 1.0
) -> dict[str, Tensor]:
    """`itm`, `mlm` and, where patches were removed, `mim`; means over pairs, labels and patches. Arguments as
    in `pretrain_losses`."""
    losses = {
        "itm": matching_loss(predicted.match_logits, len(predicted.match_logits) // 3),
        "mlm": token_loss(predicted, taught, alpha=alpha),
    }
    if predicted.patches is not None:
        losses["mim"] = masked_image_weight * patch_loss(predicted.patches)
    return losses


def momentum_contrastive_loss(
    pairs: Pairs | PairStates,
    taught: Taught,
    temperature: Tensor,
    queue: FeatureQueue,
    *,
    alpha: float,
    identities_B: Tensor | None = None,
) -> Tensor:
    """ITC of this rank's B pairs against the teacher's features of the same batch and the queue, mean of both
    directions.

    Features of other ranks are no negatives in this step, only in later ones. Source: ALBEF section 3.2.
    """
    matches = None
    if identities_B is not None:
        if queue.ids is None:
            raise ValueError("identities need a queue that keeps them: FeatureQueue(..., identities=True)")
        matches = identities_B[:, None] == torch.cat([identities_B, queue.ids])[None, :]
    image_keys, text_keys = (
        torch.cat([own, old.to(own.dtype)])
        for own, old in ((taught.image_projection, queue.image), (taught.text_projection, queue.text))
    )
    total = torch.zeros((), device=temperature.device)
    with torch.autocast(temperature.device.type, enabled=False):
        for query, believed, keys in (
            (pairs.image_projection, taught.image_projection, text_keys),
            (pairs.text_projection, taught.text_projection, image_keys),
        ):
            targets = momentum_targets(
                believed, keys, temperature=temperature.detach(), alpha=alpha, matches_BM=matches
            )
            total = total + vlp_ops.info_nce(query, keys, 1 / temperature, soft_targets=targets).mean() / 2
    return total


def hidden_loss(
    image_HBE: Tensor,
    text_HBE: Tensor,
    all_image_HGE: Tensor,
    all_text_HGE: Tensor,
    temperature: Tensor,
    *,
    first: int = 0,
    targets: HiddenTargets = "own",
) -> Tensor:
    """Contrastive loss of each level, [H], unweighted: mean of both directions, hard targets, no teacher, no
    queue.

    Args:
        image_HBE, text_HBE: This rank's features.
        all_image_HGE, all_text_HGE: Those of all ranks, without gradient: each direction trains its query
            side only.
        temperature: Of the model.
        first: Row of the gathered features that is this rank's row 0.
        targets: "own": row b matches the gathered row `first + b`. "as_released": row b of every rank matches
            the gathered row b, which on ranks above 0 belongs to rank 0; the released code does so, and its
            checkpoints of several GPUs learned from it.

    Source: arXiv 2208.13628 section 3.2.
    """
    own = torch.arange(image_HBE.shape[1], device=image_HBE.device)
    positives = own if targets == "as_released" else own + first
    with torch.autocast(image_HBE.device.type, enabled=False):
        scale = 1 / temperature
        levels = [
            (
                vlp_ops.info_nce(image, texts.detach(), scale, positives=positives).mean()
                + vlp_ops.info_nce(text, images.detach(), scale, positives=positives).mean()
            )
            / 2
            for image, text, images, texts in zip(
                image_HBE, text_HBE, all_image_HGE, all_text_HGE, strict=True
            )
        ]
    return torch.stack(levels)


def token_loss(pairs: Pairs | Predicted, taught: Taught, *, alpha: float) -> Tensor:
    """MLM with the teacher's logits at the same places: mean over all labels of the batch, 0 when there is
    none."""
    if pairs.token_logits is None or pairs.token_labels is None:
        raise ValueError("no masked texts were given, so there is no token to predict")
    each = distilled_cross_entropy(pairs.token_logits, pairs.token_labels, taught.token_logits, alpha=alpha)
    return each.sum() / (pairs.token_labels != IGNORED).sum().clamp(min=1)


def patch_loss(patches: PredictedPatches) -> Tensor:
    """MIM: the mean over the ways of prediction that there are."""
    losses = [
        masked_image_loss(predicted, patches.targets, patches.removed)
        for predicted in (patches.predicted, patches.fused)
        if predicted is not None
    ]
    return torch.stack(losses).mean()


def _gather(levels: Levels | None, taught: Taught) -> Tensor:
    """Features of all ranks, without gradient, in one message: [2 + 2H, G, E], the teacher's image and text,
    then the levels' images and texts."""
    stacked = [taught.image_projection[None], taught.text_projection[None]]
    if levels is not None:
        stacked += [levels.image.detach(), levels.text.detach()]
    return distributed.gather(torch.cat(stacked).transpose(0, 1).contiguous(), "none").transpose(0, 1)
