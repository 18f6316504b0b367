"""X-VLM: Multi-Grained Vision Language Pre-Training (Zeng, Zhang, Li; ICML 2022, arXiv 2111.08276).

One model aligns texts with whole images, regions and objects: a region is the set of patches that it covers.
Four objectives on every (visual concept, text) pair: contrastive (ITC), matching with hard negatives (ITM),
masked language modelling (MLM), and the box that a text speaks of, from the whole image.

    schema/      what a recipe of each task may say
    pretrain.py, retrieval.py, vqa.py, nlvr.py, grounding.py, captioning.py
                 the objectives of a task's stages, and builders that join model, data and evaluation
    regions.py   the stream of regions
    losses.py    sums of losses, from what the model gives
    rules.py     which parameters decay, and which learn faster
    recipes/     the official runs, and for each a small one on drawn images for two CPU cores

The model itself is `vlp_core.models.xvlm.model`, the data side is `vlp_data.examples` and `vlp_data.regions`.
"""

from vlp_methods.engine.entry import TaskEntry


def _entry(module: str, schema: str, build: str = "build") -> TaskEntry:
    return TaskEntry(
        schema=f"vlp_methods.xvlm.schema.{module}:{schema}", build=f"vlp_methods.xvlm.{module}:{build}"
    )


tasks = {
    "pretrain": _entry("pretrain", "Pretrain"),
    "retrieval": _entry("retrieval", "Retrieval"),
    "vqa": _entry("vqa", "Vqa"),
    "nlvr_domain": _entry("nlvr", "NlvrDomain", "build_domain"),
    "nlvr": _entry("nlvr", "Nlvr"),
    "weak_grounding": _entry("grounding", "WeakGrounding", "build_weak"),
    "boxes_domain": _entry("grounding", "BoxesDomain", "build_domain"),
    "boxes": _entry("grounding", "Boxes", "build_boxes"),
    "captioning_domain": _entry("captioning", "CaptioningDomain", "build_domain"),
    "captioning": _entry("captioning", "Captioning"),
    "captioning_scst": _entry("captioning", "CaptioningScst", "build_scst"),
}
