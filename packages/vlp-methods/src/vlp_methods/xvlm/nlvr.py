"""X-VLM on NLVR2: is a sentence true of two images?

Two stages: domain pre-training on images with captions, where a caption stands beside two images of the batch
and the model tells which of them it describes, if any; then fine-tuning on NLVR2 itself.

Source: arXiv 2111.08276 section 4.2; `NLVR_pretrain.py`, `NLVR.py` and `configs/NLVR*.yaml` of the official
code.
"""

from vlp_data.examples import NlvrExamples, RetrievalExamples

from vlp_methods.engine.job import Job
from vlp_methods.parts import evaluation
from vlp_methods.parts.data import examples_of, open_tokenizer, settle, train_stream
from vlp_methods.parts.finetune import job, start
from vlp_methods.parts.objectives import AssignmentTask, NlvrTask
from vlp_methods.xvlm.finetune import optimizer
from vlp_methods.xvlm.schema.nlvr import Nlvr, NlvrDomain


def build_domain(recipe: NlvrDomain) -> Job:
    """Model, data and optimizer of domain pre-training."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    started = start("nlvr_domain", recipe.model, tokenizer, "xvlm")

    examples = examples_of(RetrievalExamples, data, tokenizer)

    return job(
        recipe,
        data,
        started,
        AssignmentTask(started.model),
        train_stream(recipe, data, examples, data.train.batch),
        optimizer(recipe, started.model),
    )


def build(recipe: Nlvr) -> Job:
    """Model, data, optimizer and evaluations of fine-tuning."""
    data = settle(recipe.data)
    tokenizer = open_tokenizer(data.tokenizer)
    started = start("nlvr", recipe.model, tokenizer, "xvlm")

    examples = examples_of(NlvrExamples, data, tokenizer)

    measure = evaluation.sentence_labels(recipe, data, tokenizer, recipe.labels)
    return job(
        recipe,
        data,
        started,
        NlvrTask(started.model),
        train_stream(recipe, data, examples, data.train.batch),
        optimizer(recipe, started.model),
        measure=measure,
        val=data.val,
        test=data.test,
    )
