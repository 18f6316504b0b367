"""X-VLM pre-training: ITC, ITM and MLM on images with captions and on regions with phrases, box regression on
regions.

Source: arXiv 2111.08276 section 3; `Pretrain.py` and `configs/Pretrain_XVLM_base_4m.yaml` of the official
code.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vlp_core import distributed
from vlp_core.losses.masked_language import IGNORED
from vlp_core.losses.matching import Negatives
from vlp_core.models.fusion.model import PairStates
from vlp_core.models.xvlm.model import Xvlm
from vlp_data.batch import ImageTextBatch, RegionBatch
from vlp_data.examples import ImageTextExamples
from vlp_data.loader import Loader
from vlp_data.text import Tokenizer

from vlp_methods.builders import evaluation
from vlp_methods.builders.assembly import assemble
from vlp_methods.builders.data import images_of
from vlp_methods.builders.model import encoder_arguments, load_encoders
from vlp_methods.engine.gradients import in_one, pieces, shares
from vlp_methods.engine.job import Job, Mixing
from vlp_methods.xvlm.losses import contrastive_loss, fusion_losses
from vlp_methods.xvlm.regions import open_regions
from vlp_methods.xvlm.rules import parameter_rules
from vlp_methods.xvlm.schema.pretrain import Data, Model, Pretrain


class PretrainTask(nn.Module):
    """The objective: named losses of a batch of images or of regions, all with weight 1. The box head has no
    part in a batch of images."""

    def __init__(self, model: Xvlm, *, gather_gradient: distributed.GatherGradient = "local") -> None:
        super().__init__()
        self.model = model
        self.gather_gradient: distributed.GatherGradient = gather_gradient

    def forward(self, batch: ImageTextBatch | RegionBatch) -> dict[str, Tensor]:
        return in_one(self, batch)

    def divide(self, batch: ImageTextBatch | RegionBatch, parts: int) -> Sequence[Any]:
        """Parts of a batch; pairs of one image stay together, so that few images are encoded twice."""
        return (batch.by_image() if isinstance(batch, RegionBatch) else batch).split(parts)

    def encode(self, batch: ImageTextBatch | RegionBatch) -> PairStates:
        """What both encoders make of a batch or a part of it."""
        regions = batch if isinstance(batch, RegionBatch) else None
        return self.model.encode_pretraining(
            images_of(batch),
            batch.text_ids,
            batch.attention_mask,
            batch.masked_ids,
            image_index_B=regions.image_index if regions is not None else None,
            image_attention_mask_BL=regions.image_attention_mask if regions is not None else None,
        )

    def objective(
        self, states: PairStates, parts: Sequence[ImageTextBatch | RegionBatch]
    ) -> Iterator[dict[str, Tensor]]:
        """`itc` of the whole batch, then what the fusion encoder says about each part; negatives are drawn
        from the whole batch."""
        self.model.clamp_temperature()
        yield {"itc": contrastive_loss(states, self.model.temperature, gather_gradient=self.gather_gradient)}
        negatives = self.model.draw_negatives(states.image_projection, states.text_projection)
        counted = shares([(part.masked_labels != IGNORED).sum() for part in parts])
        boxed = shares([boxes_in(part) for part in parts])
        seen = pieces(len(part.image) for part in parts)
        for piece, images in zip(pieces(len(part.text_ids) for part in parts), seen, strict=True):
            own, against = states.among(piece.rows, negatives)
            if own.full_embeds is not None:
                own = own._replace(full_embeds=own.full_embeds[images.rows])
            share = {"itm": piece.share, "mlm": counted[piece.number]}
            share |= dict.fromkeys(("bbox", "giou"), boxed[piece.number])
            losses = self.fusion_losses(own, against, parts[piece.number])
            del own
            yield {name: loss * share[name] for name, loss in losses.items()}

    def fusion_losses(
        self, states: PairStates, negatives: Negatives, batch: ImageTextBatch | RegionBatch
    ) -> dict[str, Tensor]:
        """`fusion_losses` of a batch, or of a part of it with its negatives behind it."""
        regions = batch if isinstance(batch, RegionBatch) else None
        predicted = self.model.predict(
            states,
            negatives,
            batch.masked_positions,
            batch.masked_labels,
            image_index_B=regions.image_index if regions is not None else None,
        )
        return fusion_losses(
            predicted,
            target_boxes_B4=regions.target_boxes if regions is not None else None,
            is_image_B=regions.is_image if regions is not None else None,
        )


def boxes_in(batch: ImageTextBatch | RegionBatch) -> Tensor:
    """How many pairs of a batch count in the box losses."""
    if isinstance(batch, RegionBatch):
        return (1 - batch.is_image).sum()
    return torch.zeros((), dtype=torch.int64, device=batch.image.device)


def build(recipe: Pretrain) -> Job:
    """Model, data, optimizer and test of a recipe."""
    made = assemble(recipe, "xvlm", "pretrain", partial(model_arguments, recipe.model))
    model, data = made.model, made.data
    load_encoders(model, recipe.model.weights)
    task = PretrainTask(model, gather_gradient=recipe.gather_gradient)

    def streams() -> Mapping[str, Loader[Any]]:
        pairs = partial(ImageTextExamples, masking=data.masking)
        opened = {"images": made.open(pairs, data.images.source, "images", data.images.batch)}
        if data.regions is not None:
            opened["regions"] = open_regions(made, data.regions, "regions", data.masking)
        return opened

    return made.job(
        task,
        streams,
        parameter_rules(model, fresh_lr_scale=recipe.optimizer.lr_scale),
        mixing=mixing(data),
        unused={"images": tuple(model.bbox_head.parameters())},
        evaluations=evaluation.pretraining(made, "retrieval", recipe.retrieval),
    )


def model_arguments(options: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """Arguments of `vlp_core.models.create("xvlm", "pretrain", ...)`."""
    return {
        **encoder_arguments(options, tokenizer),
        "embed_width": options.embed_width,
        "temperature": options.temperature,
    }


def mixing(data: Data) -> Mixing:
    """Regions in a share of the steps, then always images (`iter_perc`, specification 4.2)."""
    regions = () if data.regions is None else (("regions", data.regions.share),)
    return Mixing((*regions, ("images", 1.0)))
