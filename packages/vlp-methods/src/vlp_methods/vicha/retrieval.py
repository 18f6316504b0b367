"""ViCHA retrieval fine-tuning, also of weakly supervised grounding: ITC and ITM, where captions of one image
are positives of each other.

Source: arXiv 2208.13628; `Retrieval.py`, `Grounding.py`, `configs/Retrieval_*.yaml` and
`configs/Grounding.yaml` of the official code.
"""

from torch import Tensor, nn
from vlp_core.models.vicha.losses import retrieval_losses
from vlp_core.models.vicha.model import NOT_TAUGHT, Vicha
from vlp_core.momentum import FeatureQueue
from vlp_data.batch import RetrievalBatch
from vlp_data.examples import RetrievalExamples

from vlp_methods.engine.job import Job
from vlp_methods.parts import evaluation
from vlp_methods.parts.data import concepts_of, examples_of, open_tokenizer, settle, train_stream
from vlp_methods.parts.finetune import job, make
from vlp_methods.parts.momentum import Momentum
from vlp_methods.parts.teacher import QueueTeacher
from vlp_methods.vicha.finetune import load, optimizer
from vlp_methods.vicha.schema.grounding import WeakGrounding
from vlp_methods.vicha.schema.retrieval import Retrieval


class RetrievalTask(nn.Module):
    """The objective: `itc` and `itm` of images with a text each, both with weight 1, beside a teacher and a
    queue that live here."""

    def __init__(self, model: Vicha, teacher: QueueTeacher) -> None:
        super().__init__()
        self.model = model
        self.momentum = Momentum(model, teacher, without=NOT_TAUGHT)
        self.queue = FeatureQueue(teacher.queue, model.vision_proj.out_features, identities=True)

    def before_forward(self, step: int) -> None:
        self.momentum.before_forward(self.model, step)

    def forward(self, batch: RetrievalBatch) -> dict[str, Tensor]:
        inputs, concepts = (batch.image, batch.text_ids, batch.attention_mask), concepts_of(batch)
        taught = self.momentum.teacher.teach(*inputs, concepts=concepts)
        pairs = self.model.pair(*inputs, taught=taught, identities_B=batch.image_ids, concepts=concepts)
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
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    started = make("retrieval", recipe.model, tokenizer, "vicha")
    task = RetrievalTask(started.model, recipe.teacher)
    load(started.model, recipe.model.weights.model, task.momentum, task.queue)
    examples = examples_of(RetrievalExamples, data, tokenizer)
    return job(
        recipe,
        data,
        started,
        task,
        train_stream(recipe, data, examples, data.train.batch),
        optimizer(recipe, started.model),
        measure=evaluation.retrieval(recipe, data, tokenizer, recipe.retrieval),
        val=data.val if recipe.select == "val" else data.test,
        test=data.test,
        select=recipe.select,
        momentum={"teacher": task.momentum.teacher, "queue": task.queue},
    )


def build_weak(recipe: WeakGrounding) -> Job:
    """Model, teacher, data, optimizer and evaluations of weakly supervised grounding."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    started = make("retrieval", recipe.model, tokenizer, "vicha")
    task = RetrievalTask(started.model, recipe.teacher)
    load(started.model, recipe.model.weights.model, task.momentum, task.queue)
    examples = examples_of(RetrievalExamples, data, tokenizer)
    return job(
        recipe,
        data,
        started,
        task,
        train_stream(recipe, data, examples, data.train.batch),
        optimizer(recipe, started.model),
        measure=evaluation.heat(recipe, data, tokenizer, recipe.heat),
        val=data.val,
        test=data.test,
        momentum={"teacher": task.momentum.teacher, "queue": task.queue},
    )
