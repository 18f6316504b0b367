"""ViCHA retrieval fine-tuning, also of weakly supervised grounding: ITC and ITM, where captions of one image
are positives of each other.

Source: arXiv 2208.13628; `Retrieval.py`, `Grounding.py`, `configs/Retrieval_*.yaml` and
`configs/Grounding.yaml` of the official code.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from vlp_core.losses import matching_loss
from vlp_core.models.fusion.model import PairStates
from vlp_core.models.vicha.model import NOT_TAUGHT, Taught, Vicha
from vlp_core.momentum import FeatureQueue
from vlp_data.batch import RetrievalBatch
from vlp_data.examples import RetrievalExamples

from vlp_methods.builders import evaluation
from vlp_methods.builders.assembly import assemble
from vlp_methods.builders.data import images_of
from vlp_methods.builders.teacher import Momentum, TaughtTask
from vlp_methods.engine.gradients import added, pieces
from vlp_methods.engine.job import Job
from vlp_methods.sections.teacher import QueueTeacher
from vlp_methods.vicha.losses import feature_losses
from vlp_methods.vicha.pretrain import joined
from vlp_methods.vicha.rules import parameter_rules
from vlp_methods.vicha.schema.grounding import WeakGrounding
from vlp_methods.vicha.schema.retrieval import Retrieval


class RetrievalTask(TaughtTask):
    """The objective: `itc` and `itm` of images with a text each, both with weight 1, beside a teacher and a
    queue that live here."""

    momentum: Momentum
    queue: FeatureQueue

    def __init__(self, model: Vicha, teacher: QueueTeacher) -> None:
        momentum = Momentum(model, teacher, without=NOT_TAUGHT)
        super().__init__(
            model, momentum, FeatureQueue(teacher.queue, model.vision_proj.out_features, identities=True)
        )

    def forward(self, batch: RetrievalBatch) -> dict[str, Tensor]:
        taught = self.teach(batch)
        return added(self.objective(self.encode(batch), (batch,), (taught,)))

    def teach(self, batch: RetrievalBatch) -> Taught:
        """What the teacher makes of a batch or a part of it."""
        return self.momentum.teacher.teach(images_of(batch), batch.text_ids, batch.attention_mask)

    def encode(self, batch: RetrievalBatch) -> PairStates:
        """What both encoders make of a batch or a part of it."""
        return self.model.encode_pairs(images_of(batch), batch.text_ids, batch.attention_mask)

    def objective(
        self, states: PairStates, parts: Sequence[RetrievalBatch], taught: Sequence[Taught] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """`itc` of the whole batch, then `itm` of each part; negatives are drawn from the whole batch.
        `taught` None asks the teacher."""
        believed = joined([self.teach(part) for part in parts] if taught is None else taught)
        ids = torch.cat([part.image_ids for part in parts])
        negatives = self.model.draw_negatives(states.image_projection, states.text_projection, believed, ids)
        yield feature_losses(
            states,
            believed,
            self.model.temperature,
            self.queue,
            alpha=self.momentum.alpha,
            identities_B=ids,
        )
        for piece in pieces(len(part.text_ids) for part in parts):
            logits = self.model.match_states(*states.among(piece.rows, negatives))
            yield {"itm": matching_loss(logits, len(logits) // 3) * piece.share}


def build(recipe: Retrieval) -> Job:
    """Model, teacher, data, optimizer and evaluations of retrieval."""
    made = assemble(recipe, "vicha", "retrieval")
    return made.job(
        RetrievalTask(made.model, recipe.teacher),
        made.stream(RetrievalExamples),
        parameter_rules(),
        evaluations=evaluation.fine_tuning(made, "retrieval", recipe.retrieval),
    )


def build_weak(recipe: WeakGrounding) -> Job:
    """Model, teacher, data, optimizer and evaluations of weakly supervised grounding."""
    made = assemble(recipe, "vicha", "retrieval")
    return made.job(
        RetrievalTask(made.model, recipe.teacher),
        made.stream(RetrievalExamples),
        parameter_rules(),
        evaluations=evaluation.fine_tuning(made, "weak_grounding", recipe.heat),
    )
