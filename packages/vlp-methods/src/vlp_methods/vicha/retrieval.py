"""ViCHA retrieval fine-tuning, also of weakly supervised grounding: ITC and ITM, where captions of one image
are positives of each other.

Source: arXiv 2208.13628; `Retrieval.py`, `Grounding.py`, `configs/Retrieval_*.yaml` and
`configs/Grounding.yaml` of the official code.
"""

from torch import Tensor
from vlp_core.models.vicha.model import NOT_TAUGHT, Vicha
from vlp_core.momentum import FeatureQueue
from vlp_data.batch import RetrievalBatch
from vlp_data.examples import RetrievalExamples

from vlp_methods.builders import evaluation
from vlp_methods.builders.assembly import assemble
from vlp_methods.builders.data import images_of
from vlp_methods.builders.teacher import Momentum, TaughtTask
from vlp_methods.engine.job import Job
from vlp_methods.sections.teacher import QueueTeacher
from vlp_methods.vicha.losses import retrieval_losses
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
        inputs = images_of(batch), batch.text_ids, batch.attention_mask
        taught = self.momentum.teacher.teach(*inputs)
        pairs = self.model.pair(*inputs, taught=taught, identities_B=batch.image_ids)
        return retrieval_losses(
            pairs,
            taught,
            self.model.temperature,
            self.queue,
            identities_B=batch.image_ids,
            alpha=self.momentum.alpha,
        )


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
