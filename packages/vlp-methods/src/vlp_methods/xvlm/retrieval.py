"""X-VLM retrieval fine-tuning: ITC and ITM, where captions of one image are positives of each other.

Source: arXiv 2111.08276 section 4.2; `Retrieval.py` and `configs/Retrieval_*.yaml` of the official code.
"""

from torch import Tensor, nn
from vlp_core import distributed
from vlp_core.models.xvlm.model import Xvlm
from vlp_data.batch import RetrievalBatch
from vlp_data.examples import RetrievalExamples

from vlp_methods.builders import evaluation
from vlp_methods.builders.assembly import assemble
from vlp_methods.builders.data import images_of
from vlp_methods.engine.job import Job
from vlp_methods.xvlm.losses import retrieval_losses
from vlp_methods.xvlm.rules import fine_tuning_rules
from vlp_methods.xvlm.schema.retrieval import Retrieval


class RetrievalTask(nn.Module):
    """The objective, also of weakly supervised grounding: `itc` and `itm` of images with a text each, both
    with weight 1."""

    def __init__(self, model: Xvlm, *, gather_gradient: distributed.GatherGradient = "local") -> None:
        super().__init__()
        self.model = model
        self.gather_gradient: distributed.GatherGradient = gather_gradient

    def forward(self, batch: RetrievalBatch) -> dict[str, Tensor]:
        pairs = self.model.pair(
            images_of(batch),
            batch.text_ids,
            batch.attention_mask,
            identities_B=batch.image_ids,
        )
        return retrieval_losses(
            pairs,
            self.model.temperature,
            identities_B=batch.image_ids,
            gather_gradient=self.gather_gradient,
        )


def build(recipe: Retrieval) -> Job:
    """Model, data, optimizer and evaluations of a recipe."""
    made = assemble(recipe, "xvlm", "retrieval")
    return made.job(
        RetrievalTask(made.model, gather_gradient=recipe.gather_gradient),
        made.stream(RetrievalExamples),
        fine_tuning_rules(recipe, made.model),
        evaluations=evaluation.fine_tuning(made, "retrieval", recipe.retrieval),
    )
