"""Objectives of tasks that several methods have; some learn from a momentum teacher beside the labels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vlp_core.losses import answer_loss, distilled_cross_entropy, distilled_language_loss
from vlp_core.losses.masked_language import IGNORED
from vlp_core.models.fusion.nlvr import NlvrModel, released_pool
from vlp_core.models.fusion.vqa import VqaModel
from vlp_data.batch import NlvrBatch, RetrievalBatch, VqaBatch

from vlp_methods.builders.data import images_of, sides_of
from vlp_methods.builders.teacher import Momentum, TaughtTask


class AssignmentTask(nn.Module):
    """The objective of the domain stage of NLVR2: cross entropy over three classes, text fits the first
    image, the second, none."""

    def __init__(self, model: NlvrModel) -> None:
        super().__init__()
        # It finds similar images and is not trained (no gradient reaches it in the reference either).
        model.vision_proj.requires_grad_(False)
        self.model = model

    def forward(self, batch: RetrievalBatch) -> dict[str, Tensor]:
        pool, visible = self.model.encode(images_of(batch))
        pairs = self.model.assignment_pairs(pool)
        logits = self.model.classify(
            pool, pairs.first, pairs.second, batch.text_ids, batch.attention_mask, visible
        )
        return {"assignment": F.cross_entropy(logits.float(), pairs.labels)}


class NlvrTask(TaughtTask):
    """The objective of fine-tuning on NLVR2: cross entropy over two classes, 1 = true, and with the teacher's
    where there is one.

    Args:
        model: Model.
        momentum: Teacher; None: none.
        as_released: The teacher does not look at the images by its own image encoder, but by the model's, as
            in the released code of ViCHA (`vlp_core.models.fusion.nlvr.released_pool`).
    """

    def __init__(
        self, model: NlvrModel, momentum: Momentum | None = None, *, as_released: bool = False
    ) -> None:
        super().__init__(model, momentum)
        self.as_released = as_released

    def started_teacher(self) -> nn.Module | None:
        """The released code copies the model before it reads the checkpoint, so that its teacher starts from
        random values."""
        return None if self.as_released else super().started_teacher()

    def forward(self, batch: NlvrBatch) -> dict[str, Tensor]:
        first = torch.arange(len(batch.labels), device=batch.labels.device)
        texts = (first, first + len(first), batch.text_ids, batch.attention_mask)
        sides = sides_of(batch)
        pool, visible = self.model.encode(*sides)
        logits = self.model.classify(pool, *texts, visible)
        taught, alpha = None, 0.0
        if self.momentum is not None:
            with torch.no_grad():
                teacher, alpha = self.momentum.teacher, self.momentum.alpha
                if self.as_released:
                    pool, visible = released_pool(self.model, teacher, *sides)
                else:
                    pool, visible = teacher.encode(*sides)
                taught = teacher.classify(pool, *texts, visible)
        return {"labels": distilled_cross_entropy(logits, batch.labels, taught, alpha=alpha).mean()}


class VqaTask(TaughtTask):
    """The objective: per question the sum over its answers of weight * cross entropy of the answer's tokens,
    [SEP] included, and with the teacher's tokens where there is one."""

    def __init__(self, model: VqaModel, momentum: Momentum | None = None) -> None:
        super().__init__(model, momentum)

    def forward(self, batch: VqaBatch) -> dict[str, Tensor]:
        inputs = (
            images_of(batch),
            batch.question_ids,
            batch.question_mask,
            batch.answer_ids,
            batch.answer_mask,
            batch.question_index,
        )
        logits = self.model(*inputs)
        taught, alpha = None, 0.0
        if self.momentum is not None:
            with torch.no_grad():
                taught, alpha = self.momentum.teacher(*inputs), self.momentum.alpha
        labels = batch.answer_ids.masked_fill(batch.answer_mask == 0, IGNORED)
        per_answer = distilled_language_loss(logits, labels, taught, alpha=alpha)
        return {"answers": answer_loss(per_answer, batch.answer_weights, len(batch.question_ids))}
