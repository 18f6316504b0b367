"""X-VLM on NLVR2: is a sentence true of two images?

Two stages: domain pre-training on images with captions, where a caption stands beside two images of the batch
and the model tells which of them it describes, if any; then fine-tuning on NLVR2 itself.

Source: arXiv 2111.08276 section 4.2; `NLVR_pretrain.py`, `NLVR.py` and `configs/NLVR*.yaml` of the official
code.
"""

from vlp_data.examples import NlvrExamples, RetrievalExamples

from vlp_methods.builders import evaluation
from vlp_methods.builders.assembly import assemble
from vlp_methods.builders.tasks import AssignmentTask, NlvrTask
from vlp_methods.engine.job import Job
from vlp_methods.xvlm.rules import fine_tuning_rules
from vlp_methods.xvlm.schema.nlvr import Nlvr, NlvrDomain


def build_domain(recipe: NlvrDomain) -> Job:
    """Model, data and optimizer of domain pre-training."""
    made = assemble(recipe, "xvlm", "nlvr_domain")
    return made.job(
        AssignmentTask(made.model), made.stream(RetrievalExamples), fine_tuning_rules(recipe, made.model)
    )


def build(recipe: Nlvr) -> Job:
    """Model, data, optimizer and evaluations of fine-tuning."""
    made = assemble(recipe, "xvlm", "nlvr")
    return made.job(
        NlvrTask(made.model),
        made.stream(NlvrExamples),
        fine_tuning_rules(recipe, made.model),
        evaluations=evaluation.fine_tuning(made, "nlvr", recipe.labels),
    )
