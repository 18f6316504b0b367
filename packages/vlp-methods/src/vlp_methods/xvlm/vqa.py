"""X-VLM visual question answering: a decoder writes the answers that people gave, weighted by how many gave
them.

Source: ALBEF, arXiv 2107.07651 section 4, whose way X-VLM follows; `VQA.py` and `configs/VQA*.yaml` of the
official code.
"""

from vlp_data.examples import VqaExamples

from vlp_methods.builders import evaluation
from vlp_methods.builders.assembly import assemble
from vlp_methods.builders.tasks import VqaTask
from vlp_methods.engine.job import Job
from vlp_methods.xvlm.rules import fine_tuning_rules
from vlp_methods.xvlm.schema.vqa import Vqa


def build(recipe: Vqa) -> Job:
    """Model, data, optimizer and evaluations of a recipe."""
    made = assemble(recipe, "xvlm", "vqa", clean="question")
    return made.job(
        VqaTask(made.model),
        made.stream(VqaExamples),
        fine_tuning_rules(recipe, made.model),
        evaluations=evaluation.fine_tuning(made, "vqa", recipe.answers),
    )
