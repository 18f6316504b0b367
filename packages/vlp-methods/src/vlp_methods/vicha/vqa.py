"""ViCHA visual question answering: a decoder writes the answers that people gave, weighted by how many gave
them.

Source: ALBEF, arXiv 2107.07651 section 4, whose way ViCHA follows; `VQA.py` and `configs/VQA.yaml` of the
official code.
"""

from vlp_data.examples import VqaExamples

from vlp_methods.engine.job import Job
from vlp_methods.parts import evaluation
from vlp_methods.parts.data import examples_of, open_tokenizer, settle, train_stream
from vlp_methods.parts.finetune import job, make
from vlp_methods.parts.momentum import Momentum
from vlp_methods.parts.objectives import VqaTask
from vlp_methods.vicha.finetune import load, optimizer
from vlp_methods.vicha.schema.vqa import Vqa


def build(recipe: Vqa) -> Job:
    """Model, teacher, data, optimizer and evaluations of a recipe."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    started = make("vqa", recipe.model, tokenizer, "vicha")
    momentum = None if recipe.teacher is None else Momentum(started.model, recipe.teacher)
    load(started.model, recipe.model.weights.model, momentum)
    examples = examples_of(VqaExamples, data, tokenizer)
    return job(
        recipe,
        data,
        started,
        VqaTask(started.model, momentum),
        train_stream(recipe, data, examples, data.train.batch),
        optimizer(recipe, started.model),
        measure=evaluation.answers(recipe, data, tokenizer, recipe.answers, data.candidates),
        val=data.val,
        test=data.test,
    )
