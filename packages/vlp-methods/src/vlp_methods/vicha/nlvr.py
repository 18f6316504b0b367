"""ViCHA on NLVR2: is a sentence true of two images? Text assignment on images with captions first, then NLVR2
itself.

Source: ALBEF, arXiv 2107.07651 appendix A, whose way ViCHA follows; `Pretrain_nlvr.py`, `NLVR.py` and their
configs in the official code.
"""

from vlp_data.examples import NlvrExamples, RetrievalExamples

from vlp_methods.engine.job import Job
from vlp_methods.parts import evaluation
from vlp_methods.parts.data import examples_of, open_tokenizer, settle, train_stream
from vlp_methods.parts.finetune import job, make, start
from vlp_methods.parts.momentum import Momentum
from vlp_methods.parts.objectives import AssignmentTask, NlvrTask
from vlp_methods.vicha.finetune import load, optimizer
from vlp_methods.vicha.schema.nlvr import Nlvr, NlvrDomain


def build_domain(recipe: NlvrDomain) -> Job:
    """Model, data and optimizer of text assignment."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    started = start("nlvr_domain", recipe.model, tokenizer, "vicha")
    task = AssignmentTask(started.model)
    examples = examples_of(RetrievalExamples, data, tokenizer)
    streams = train_stream(recipe, data, examples, data.train.batch)
    return job(recipe, data, started, task, streams, optimizer(recipe, started.model))


def build(recipe: Nlvr) -> Job:
    """Model, teacher, data, optimizer and evaluations of fine-tuning."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    started = make("nlvr", recipe.model, tokenizer, "vicha")
    momentum = None if recipe.teacher is None else Momentum(started.model, recipe.teacher)
    as_released = recipe.teacher is not None and recipe.teacher.kind == "as_released"
    # The released code copies the model before it reads the checkpoint, so its teacher starts from random
    # values.
    load(started.model, recipe.model.weights.model, None if as_released else momentum)
    examples = examples_of(NlvrExamples, data, tokenizer)
    return job(
        recipe,
        data,
        started,
        NlvrTask(started.model, momentum, as_released=as_released),
        train_stream(recipe, data, examples, data.train.batch),
        optimizer(recipe, started.model),
        measure=evaluation.sentence_labels(recipe, data, tokenizer, recipe.labels),
        val=data.val,
        test=data.test,
    )
