"""ViCHA visual question answering: a decoder writes the answers that people gave, weighted by how many gave
them.

Source: ALBEF, arXiv 2107.07651 section 4, whose way ViCHA follows; `VQA.py` and `configs/VQA.yaml` of the
official code.
"""

from vlp_data.examples import VqaExamples

from vlp_methods.builders import evaluation
from vlp_methods.builders.assembly import assemble
from vlp_methods.builders.tasks import VqaTask
from vlp_methods.builders.teacher import momentum_of
from vlp_methods.engine.job import Job
from vlp_methods.vicha.rules import parameter_rules
from vlp_methods.vicha.schema.vqa import Vqa


def build(recipe: Vqa) -> Job:
    """Model, teacher, data, optimizer and evaluations of a recipe."""
    made = assemble(recipe, "vicha", "vqa", clean="question")
    return made.job(
        VqaTask(made.model, momentum_of(made.model, recipe.teacher)),
        made.stream(VqaExamples),
        parameter_rules(),
        evaluations=evaluation.fine_tuning(made, "vqa", recipe.answers),
    )
