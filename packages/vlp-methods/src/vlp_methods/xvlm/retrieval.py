"""X-VLM retrieval fine-tuning: ITC and ITM, where captions of one image are positives of each other.

Source: arXiv 2111.08276 section 4.2; `Retrieval.py` and `configs/Retrieval_*.yaml` of the official code.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from vlp_core import distributed
from vlp_core.losses import matching_loss
from vlp_core.models.fusion.model import PairStates
from vlp_core.models.xvlm.model import Xvlm
from vlp_data.batch import RetrievalBatch
from vlp_data.examples import RetrievalExamples

from vlp_methods.builders import evaluation
from vlp_methods.builders.assembly import assemble
from vlp_methods.builders.data import images_of
from vlp_methods.engine.gradients import in_one, pieces
from vlp_methods.engine.job import Job
from vlp_methods.xvlm.losses import contrastive_loss
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
        return in_one(self, batch)

    def encode(self, batch: RetrievalBatch) -> PairStates:
        """What both encoders make of a batch or a part of it."""
        return self.model.encode_pairs(images_of(batch), batch.text_ids, batch.attention_mask)

    def objective(self, states: PairStates, parts: Sequence[RetrievalBatch]) -> Iterator[dict[str, Tensor]]:
        """`itc` of the whole batch, then `itm` of each part; negatives are drawn from the whole batch."""
        ids = torch.cat([part.image_ids for part in parts])
        yield {
            "itc": contrastive_loss(
                states, self.model.temperature, identities_B=ids, gather_gradient=self.gather_gradient
            )
        }
        negatives = self.model.draw_negatives(states.image_projection, states.text_projection, ids)
        for piece in pieces(len(part.text_ids) for part in parts):
            logits = self.model.match_states(*states.among(piece.rows, negatives))
            yield {"itm": matching_loss(logits, len(logits) // 3) * piece.share}


def build(recipe: Retrieval) -> Job:
    """Model, data, optimizer and evaluations of a recipe."""
    made = assemble(recipe, "xvlm", "retrieval")
    return made.job(
        RetrievalTask(made.model, gather_gradient=recipe.gather_gradient),
        made.stream(RetrievalExamples),
        fine_tuning_rules(recipe, made.model),
        evaluations=evaluation.fine_tuning(made, "retrieval", recipe.retrieval),
    )
