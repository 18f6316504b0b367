"""X-VLM visual question answering: a decoder writes the answers that people gave, weighted by how many gave
them.

Source: ALBEF, arXiv 2107.07651 section 4, whose way X-VLM follows; `VQA.py` and `configs/VQA*.yaml` of the
official code.
"""

from vlp_data.examples import VqaExamples

from vlp_methods.engine.job import Job
from vlp_methods.parts import evaluation
from vlp_methods.parts.data import examples_of, open_tokenizer, settle, train_stream
from vlp_methods.parts.finetune import job, start
from vlp_methods.parts.objectives import VqaTask
from vlp_methods.xvlm.finetune import optimizer
from vlp_methods.xvlm.schema.vqa import Vqa


def build(recipe: Vqa) -> Job:
    """Model, data, optimizer and evaluations of a recipe."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    started = start("vqa", recipe.model, tokenizer, "xvlm")

    examples = examples_of(VqaExamples, data, tokenizer)

    measure = evaluation.answers(recipe, data, tokenizer, recipe.answers, data.candidates)
    return job(
        recipe,
        data,
        started,
        VqaTask(started.model),
        train_stream(recipe, data, examples, data.train.batch),
        optimizer(recipe, started.model),
        measure=measure,
        val=data.val,
        test=data.test,
    )
