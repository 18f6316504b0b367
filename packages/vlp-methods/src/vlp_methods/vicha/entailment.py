"""ViCHA on SNLI-VE: does a hypothesis follow from an image?

Source: ALBEF, arXiv 2107.07651 section 4, whose way ViCHA follows; `VE.py` and `configs/VE.yaml` of the
official code.
"""

import torch
from torch import Tensor
from vlp_core.losses import distilled_cross_entropy
from vlp_core.models.fusion.entailment import EntailmentModel
from vlp_data.batch import EntailmentBatch
from vlp_data.examples import EntailmentExamples

from vlp_methods.builders import evaluation
from vlp_methods.builders.assembly import assemble
from vlp_methods.builders.data import images_of
from vlp_methods.builders.teacher import Momentum, TaughtTask, momentum_of
from vlp_methods.engine.job import Job
from vlp_methods.vicha.rules import parameter_rules
from vlp_methods.vicha.schema.entailment import Entailment


class EntailmentTask(TaughtTask):
    """The objective: cross entropy over three classes, and with the teacher's where there is one."""

    def __init__(self, model: EntailmentModel, momentum: Momentum | None = None) -> None:
        super().__init__(model, momentum)

    def forward(self, batch: EntailmentBatch) -> dict[str, Tensor]:
        inputs = images_of(batch), batch.text_ids, batch.attention_mask
        logits = self.model(*inputs)
        taught, alpha = None, 0.0
        if self.momentum is not None:
            with torch.no_grad():
                taught, alpha = self.momentum.teacher(*inputs), self.momentum.alpha
        return {"labels": distilled_cross_entropy(logits, batch.labels, taught, alpha=alpha).mean()}


def build(recipe: Entailment) -> Job:
    """Model, teacher, data, optimizer and evaluations of a recipe."""
    made = assemble(recipe, "vicha", "entailment")
    return made.job(
        EntailmentTask(made.model, momentum_of(made.model, recipe.teacher)),
        made.stream(EntailmentExamples),
        parameter_rules(),
        evaluations=evaluation.fine_tuning(made, "entailment", recipe.labels),
    )
