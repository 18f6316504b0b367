"""X-VLM: Multi-Grained Vision Language Pre-Training (Zeng, Zhang, Li; ICML 2022, arXiv 2111.08276).

One model aligns texts with whole pictures, regions and objects: a region is the set of patches that it covers. Four objectives on every
(visual concept, text) pair: contrastive (ITC), matching with hard negatives (ITM), masked language modelling (MLM), and the box that a
text speaks of, from the whole picture.

    schema/      what a recipe of each task may say
    pretrain.py  the objective of pre-training, and the builder that joins model, data and optimizer
    recipes/     the official runs, and for each a small one on drawn pictures for two CPU cores

The model itself is `vlp_core.models.xvlm`, the losses are `vlp_core.losses`, the data side is `vlp_data.examples` and `vlp_data.regions`.
"""

from vlp_methods.engine.entry import TaskEntry


def _entry(module: str, schema: str, build: str = "build") -> TaskEntry:
    return TaskEntry(
        schema=f"vlp_methods.xvlm.schema.{module}:{schema}", build=f"vlp_methods.xvlm.{module}:{build}"
    )


tasks = {
    "pretrain": _entry("pretrain", "Pretrain"),
    "retrieval": _entry("retrieval", "Retrieval"),
}
