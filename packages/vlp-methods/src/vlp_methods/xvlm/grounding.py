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
from vlp_core.models.xvlm.model import Xvlm
from vlp_data.batch import BoxBatch, RegionBatch
from vlp_data.examples import BoxExamples, RetrievalExamples
from vlp_data.loader import Loader

from vlp_methods.builders import evaluation
from vlp_methods.builders.assembly import assemble
from vlp_methods.builders.data import TRAIN, images_of
from vlp_methods.engine.job import Job
from vlp_methods.xvlm.regions import open_regions
from vlp_methods.xvlm.retrieval import RetrievalTask
from vlp_methods.xvlm.rules import fine_tuning_rules
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
            images_of(batch),
            batch.text_ids,
            batch.attention_mask,
            regions.image_index if regions is not None else None,
        )
        losses = box_losses(
            boxes, batch.target_boxes, is_image_B=regions.is_image if regions is not None else None
        )
        return {"bbox": losses.l1, "giou": losses.giou}


def build_weak(recipe: WeakGrounding) -> Job:
    """Model, data, optimizer and evaluations of weakly supervised grounding."""
    made = assemble(recipe, "xvlm", "retrieval")
    return made.job(
        RetrievalTask(made.model, gather_gradient=recipe.gather_gradient),
        made.stream(RetrievalExamples),
        fine_tuning_rules(recipe, made.model),
        evaluations=evaluation.fine_tuning(made, "weak_grounding", recipe.heat),
    )


def build_domain(recipe: BoxesDomain) -> Job:
    """Model, data and optimizer of the domain stage with boxes."""
    made = assemble(recipe, "xvlm", "boxes")

    def streams() -> Mapping[str, Loader[Any]]:
        return {TRAIN: open_regions(made, made.data.train, TRAIN)}

    return made.job(BoxTask(made.model), streams, fine_tuning_rules(recipe, made.model))


def build_boxes(recipe: Boxes) -> Job:
    """Model, data, optimizer and evaluations of grounding with boxes."""
    made = assemble(recipe, "xvlm", "boxes")
    return made.job(
        BoxTask(made.model),
        made.stream(BoxExamples),
        fine_tuning_rules(recipe, made.model),
        evaluations=evaluation.fine_tuning(made, "grounding", recipe.boxes),
    )
