"""ViCHA on NLVR2: is a sentence true of two images? Text assignment on images with captions first, then NLVR2
itself.

Source: ALBEF, arXiv 2107.07651 appendix A, whose way ViCHA follows; `Pretrain_nlvr.py`, `NLVR.py` and their
configs in the official code.
"""

from vlp_data.examples import NlvrExamples, RetrievalExamples

from vlp_methods.builders import evaluation
from vlp_methods.builders.assembly import assemble
from vlp_methods.builders.tasks import AssignmentTask, NlvrTask
from vlp_methods.builders.teacher import momentum_of
from vlp_methods.engine.job import Job
from vlp_methods.vicha.rules import parameter_rules
from vlp_methods.vicha.schema.nlvr import Nlvr, NlvrDomain


def build_domain(recipe: NlvrDomain) -> Job:
    """Model, data and optimizer of text assignment."""
    made = assemble(recipe, "vicha", "nlvr_domain")
    return made.job(AssignmentTask(made.model), made.stream(RetrievalExamples), parameter_rules())


def build(recipe: Nlvr) -> Job:
    """Model, teacher, data, optimizer and evaluations of fine-tuning."""
    made = assemble(recipe, "vicha", "nlvr")
    momentum = momentum_of(made.model, recipe.teacher)
    as_released = recipe.teacher is not None and recipe.teacher.kind == "as_released"
    return made.job(
        NlvrTask(made.model, momentum, as_released=as_released),
        made.stream(NlvrExamples),
        parameter_rules(),
        evaluations=evaluation.fine_tuning(made, "nlvr", recipe.labels),
    )
