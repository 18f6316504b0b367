"""X-VLM pre-training: ITC, ITM and MLM on images with captions and on regions with phrases, box regression on
regions.

Source: arXiv 2111.08276 section 3; `Pretrain.py` and `configs/Pretrain_XVLM_base_4m.yaml` of the official
code.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from vlp_core import distributed, models
from vlp_core.models.xvlm.losses import pretrain_losses
from vlp_core.models.xvlm.model import Xvlm
from vlp_core.models.xvlm.rules import parameter_rules
from vlp_data.batch import ImageTextBatch, RegionBatch
from vlp_data.examples import ImageTextExamples, RegionExamples
from vlp_data.loader import Loader
from vlp_data.text import Tokenizer

from vlp_methods.engine.job import Job, Mixing
from vlp_methods.parts import evaluation
from vlp_methods.parts.assembly import adamw, encoder_arguments, exporter, learning_rate
from vlp_methods.parts.data import concepts_of, open_loader, open_tokenizer, rank_texts, settle
from vlp_methods.parts.start import initialise
from vlp_methods.xvlm.schema.pretrain import Data, Pretrain


class PretrainTask(nn.Module):
    """The objective: named losses of a batch of images or of regions, all with weight 1. The box head has no
    part in a batch of images."""

    def __init__(self, model: Xvlm, *, gather_gradient: distributed.GatherGradient = "local") -> None:
        super().__init__()
        self.model = model
        self.gather_gradient: distributed.GatherGradient = gather_gradient

    def forward(self, batch: ImageTextBatch | RegionBatch) -> dict[str, Tensor]:
        regions = batch if isinstance(batch, RegionBatch) else None
        pairs = self.model.pretrain(
            batch.image,
            batch.text_ids,
            batch.attention_mask,
            batch.masked_ids,
            batch.masked_positions,
            batch.masked_labels,
            image_index_B=regions.image_index if regions else None,
            image_attention_mask_BL=regions.image_attention_mask if regions else None,
            concepts=concepts_of(batch),
        )
        return pretrain_losses(
            pairs,
            self.model.temperature,
            target_boxes_B4=regions.target_boxes if regions else None,
            is_image_B=regions.is_image if regions else None,
            gather_gradient=self.gather_gradient,
        )


def build(recipe: Pretrain) -> Job:
    """Model, data, optimizer and test of a recipe."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    arguments = {
        **encoder_arguments(recipe.model, tokenizer),
        "embed_width": recipe.model.embed_width,
        "temperature": recipe.model.temperature,
    }
    model = models.create("xvlm", **arguments)
    initialise(model, recipe.model.weights)
    if recipe.model.weights.model:
        models.start_from(model, recipe.model.weights.model)
    rules = parameter_rules(model, fresh_lr_scale=recipe.optimizer.lr_scale)
    optimizer = adamw(model, recipe.optimizer, rules)
    task = PretrainTask(model, gather_gradient=recipe.gather_gradient)
    return Job(
        task=task,
        streams=partial(open_streams, recipe, data, tokenizer, model.vision.patch_size),
        mixing=mixing(data),
        optimizer=optimizer,
        learning_rate=learning_rate(recipe),
        unused={"images": tuple(model.bbox_head.parameters())},
        evaluate=evaluation.retrieval_test(recipe, data, tokenizer, recipe.retrieval),
        export=exporter(model, name="xvlm", arguments=arguments, data=data),
    )


def mixing(data: Data) -> Mixing:
    """Regions in a share of the steps, then always images (`iter_perc`, specification 4.2)."""
    regions = () if data.regions is None else (("regions", data.regions.share),)
    return Mixing((*regions, ("images", 1.0)))


def open_streams(
    recipe: Pretrain, data: Data, tokenizer: Tokenizer, patch_size: int
) -> Mapping[str, Loader[Any]]:
    """This rank's share of every stream."""
    make = partial(open_loader, recipe, data)
    common = {
        "tokenizer": tokenizer,
        "image": data.view,
        "text": data.text,
        "masking": data.masking,
        "concepts": data.concepts,
    }
    images = ImageTextExamples(source=data.images.source.open(), **common)
    streams = {"images": make("images", images, global_batch=data.images.batch)}
    if (regions := data.regions) is not None:
        examples = RegionExamples(
            source=regions.source.open(),
            batch_texts=rank_texts(regions, "data.regions"),
            patch_size=patch_size,
            regions=regions.options,
            **common,
        )
        streams["regions"] = make("regions", examples, global_batch=regions.images)
    return streams
