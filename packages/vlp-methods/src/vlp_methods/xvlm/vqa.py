"""X-VLM visual question answering: a decoder writes the answers that people gave, weighted by how many gave them.

Source: ALBEF, arXiv 2107.07651 section 4, whose way X-VLM follows; `VQA.py` and `configs/VQA*.yaml` of the official code.
"""

from torch import Tensor, nn
from vlp_core.losses import answer_loss, language_loss
from vlp_core.losses.masked_language import IGNORED
from vlp_core.models import VqaModel
from vlp_data.batch import VqaBatch
from vlp_data.examples import VqaExamples

from vlp_methods.engine.job import Job
from vlp_methods.parts import evaluation
from vlp_methods.parts.data import open_tokenizer, settle, train_stream
from vlp_methods.xvlm.finetune import job, start
from vlp_methods.xvlm.schema.vqa import Vqa


class VqaTask(nn.Module):
    """The objective: per question the sum over its answers of weight * cross entropy of the answer's tokens, [SEP] included."""

    def __init__(self, model: VqaModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: VqaBatch) -> dict[str, Tensor]:
        logits = self.model(
            batch.image,
            batch.question_ids,
            batch.question_mask,
            batch.answer_ids,
            batch.answer_mask,
            batch.question_index,
        )
        labels = batch.answer_ids.masked_fill(batch.answer_mask == 0, IGNORED)
        per_answer = language_loss(logits, labels, reduction="row")
        return {"answers": answer_loss(per_answer, batch.answer_weights, len(batch.question_ids))}


def build(recipe: Vqa) -> Job:
    """Model, data, optimizer and evaluations of a recipe."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    started = start("vqa", recipe.model, tokenizer)

    def examples() -> VqaExamples:
        return VqaExamples(
            source=data.train.source.open(), tokenizer=tokenizer, image=data.view, text=data.text
        )

    measure = evaluation.answers(recipe, data, tokenizer, recipe.answers, data.candidates)
    return job(
        recipe,
        data,
        started,
        VqaTask(started.model),
        train_stream(recipe, data, examples, data.train.batch),
        measure=measure,
        val=data.val,
        test=data.test,
    )
