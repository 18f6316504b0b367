"""X-VLM on RefCOCO+: which object does an expression mean?

Weakly supervised: retrieval between images and expressions; the heat map of the matching score chooses among
given detections. With boxes: the box head is trained on regions first (domain stage), then on RefCOCO+.

Source: arXiv 2111.08276 section 4.2; `Grounding.py`, `Grounding_bbox_pretrain.py`, `Grounding_bbox.py` and
their configs in the official code.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from vlp_core.losses import box_losses
from vlp_core.models import Xvlm
from vlp_data.batch import BoxBatch, RegionBatch
from vlp_data.examples import BoxExamples, RegionExamples, RetrievalExamples
from vlp_data.loader import Loader

from vlp_methods.engine.job import Job
from vlp_methods.parts import evaluation
from vlp_methods.parts.data import (
    TRAIN,
    concepts_of,
    examples_of,
    open_loader,
    open_tokenizer,
    rank_texts,
    settle,
    train_stream,
)
from vlp_methods.parts.finetune import job, start
from vlp_methods.xvlm.finetune import optimizer
from vlp_methods.xvlm.retrieval import RetrievalTask
from vlp_methods.xvlm.schema.grounding import Boxes, BoxesDomain, WeakGrounding


class BoxTask(nn.Module):
    """The objective of both stages with boxes: L1 and GIoU between the box of a text in the whole image and
    the true one."""

    def __init__(self, model: Xvlm) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: BoxBatch | RegionBatch) -> dict[str, Tensor]:
        regions = batch if isinstance(batch, RegionBatch) else None
        boxes = self.model.regress(
            batch.image,
            batch.text_ids,
            batch.attention_mask,
            regions.image_index if regions else None,
            concepts=concepts_of(batch),
        )
        losses = box_losses(boxes, batch.target_boxes, is_image_B=regions.is_image if regions else None)
        return {"bbox": losses.l1, "giou": losses.giou}


def build_weak(recipe: WeakGrounding) -> Job:
    """Model, data, optimizer and evaluations of weakly supervised grounding."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    started = start("retrieval", recipe.model, tokenizer, "xvlm")

    examples = examples_of(RetrievalExamples, data, tokenizer)

    measure = evaluation.heat(recipe, data, tokenizer, recipe.heat)
    return job(
        recipe,
        data,
        started,
        RetrievalTask(started.model, gather_gradient=recipe.gather_gradient),
        train_stream(recipe, data, examples, data.train.batch),
        optimizer(recipe, started.model),
        measure=measure,
        val=data.val,
        test=data.test,
    )


def build_domain(recipe: BoxesDomain) -> Job:
    """Model, data and optimizer of the domain stage with boxes."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    started = start("boxes", recipe.model, tokenizer, "xvlm")

    def streams() -> Mapping[str, Loader[Any]]:
        examples = RegionExamples(
            source=data.train.source.open(),
            tokenizer=tokenizer,
            batch_texts=rank_texts(data.train, "data.train"),
            patch_size=started.model.vision.patch_size,
            image=data.view,
            text=data.text,
            regions=data.train.options,
            concepts=data.concepts,
        )
        return {TRAIN: open_loader(recipe, data, TRAIN, examples, global_batch=data.train.images)}

    return job(recipe, data, started, BoxTask(started.model), streams, optimizer(recipe, started.model))


def build_boxes(recipe: Boxes) -> Job:
    """Model, data, optimizer and evaluations of grounding with boxes."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    started = start("boxes", recipe.model, tokenizer, "xvlm")

    examples = examples_of(BoxExamples, data, tokenizer)

    measure = evaluation.boxes(recipe, data, tokenizer, recipe.boxes)
    return job(
        recipe,
        data,
        started,
        BoxTask(started.model),
        train_stream(recipe, data, examples, data.train.batch),
        optimizer(recipe, started.model),
        measure=measure,
        val=data.val,
        test=data.test,
    )
