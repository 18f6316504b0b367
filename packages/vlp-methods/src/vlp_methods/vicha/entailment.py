"""ViCHA on SNLI-VE: does a hypothesis follow from an image?

Source: ALBEF, arXiv 2107.07651 section 4, whose way ViCHA follows; `VE.py` and `configs/VE.yaml` of the
official code.
"""

import torch
from torch import Tensor, nn
from vlp_core.losses import distilled_cross_entropy
from vlp_core.models import EntailmentModel
from vlp_data.batch import EntailmentBatch
from vlp_data.examples import EntailmentExamples

from vlp_methods.engine.job import Job
from vlp_methods.parts import evaluation
from vlp_methods.parts.data import concepts_of, examples_of, open_tokenizer, settle, train_stream
from vlp_methods.parts.finetune import job, make
from vlp_methods.parts.momentum import Momentum
from vlp_methods.vicha.finetune import load, optimizer
from vlp_methods.vicha.schema.entailment import Entailment


class EntailmentTask(nn.Module):
    """The objective: cross entropy over three classes, and with the teacher's where there is one."""

    def __init__(self, model: EntailmentModel, momentum: Momentum | None = None) -> None:
        super().__init__()
        self.model = model
        self.momentum = momentum

    def before_forward(self, step: int) -> None:
        if self.momentum is not None:
            self.momentum.before_forward(self.model, step)

    def forward(self, batch: EntailmentBatch) -> dict[str, Tensor]:
        inputs, concepts = (batch.image, batch.text_ids, batch.attention_mask), concepts_of(batch)
        logits = self.model(*inputs, concepts)
        taught, alpha = None, 0.0
        if self.momentum is not None:
            with torch.no_grad():
                taught, alpha = self.momentum.teacher(*inputs, concepts), self.momentum.alpha
        return {"labels": distilled_cross_entropy(logits, batch.labels, taught, alpha=alpha).mean()}


def build(recipe: Entailment) -> Job:
    """Model, teacher, data, optimizer and evaluations of a recipe."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    started = make("entailment", recipe.model, tokenizer, "vicha")
    momentum = None if recipe.teacher is None else Momentum(started.model, recipe.teacher)
    load(started.model, recipe.model.weights.model, momentum)
    examples = examples_of(EntailmentExamples, data, tokenizer)
    return job(
        recipe,
        data,
        started,
        EntailmentTask(started.model, momentum),
        train_stream(recipe, data, examples, data.train.batch),
        optimizer(recipe, started.model),
        measure=evaluation.entailment(recipe, data, tokenizer, recipe.labels),
        val=data.val,
        test=data.test,
    )
