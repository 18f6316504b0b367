"""ViCHA: Efficient Vision-Language Pretraining with Visual Concepts and Hierarchical Alignment (Shukor,
Couairon, Cord; BMVC 2022, arXiv 2208.13628).

ALBEF with three additions, each of which a recipe can leave out: words chosen for an image stand beside its
patches (concepts), lower layers are aligned too (hierarchy), and removed patches are predicted
(masked_image). A momentum teacher softens the targets; its features of earlier batches wait in a queue.

    schema/      what a recipe of each task may say
    pretrain.py, retrieval.py, vqa.py, entailment.py, nlvr.py
                 the objective of a task (what other methods have, too, is in `vlp_methods.builders.tasks`),
                 and a builder that joins model, data and evaluation
    losses.py    sums of losses, from what model and teacher give
    rules.py     which parameters decay
    recipes/     the official runs, and for each a small one on drawn images for two CPU cores

The model itself is `vlp_core.models.vicha.model`, the data side is `vlp_data.examples`.
"""

from vlp_methods.engine.entry import TaskEntry


def _entry(module: str, schema: str, build: str = "build") -> TaskEntry:
    return TaskEntry(
        schema=f"vlp_methods.vicha.schema.{module}:{schema}", build=f"vlp_methods.vicha.{module}:{build}"
    )


tasks = {
    "pretrain": _entry("pretrain", "Pretrain"),
    "retrieval": _entry("retrieval", "Retrieval"),
    "weak_grounding": TaskEntry(
        schema="vlp_methods.vicha.schema.grounding:WeakGrounding",
        build="vlp_methods.vicha.retrieval:build_weak",
    ),
    "vqa": _entry("vqa", "Vqa"),
    "entailment": _entry("entailment", "Entailment"),
    "nlvr_domain": _entry("nlvr", "NlvrDomain", "build_domain"),
    "nlvr": _entry("nlvr", "Nlvr"),
}
