"""The row of X-VLM: its stages of training and its official files.

Source: arXiv 2111.08276.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from vlp_core.models.family import Earlier, Family, Stage
from vlp_core.models.fusion import conversion
from vlp_core.models.fusion.earlier import shared_stage
from vlp_core.models.fusion.encoders import create_encoders
from vlp_core.models.fusion.stages import LAYOUT, STARTS, contrast_of, encoders_of, shared_stages
from vlp_core.models.xvlm.checkpoints import FILES
from vlp_core.models.xvlm.model import HEADS, Head, Xvlm


def create(
    *,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    concepts: Mapping[str, Any] | None = None,
    embed_width: int = 256,
    temperature: float = 0.07,
    heads: Iterable[Head] = HEADS,
) -> Xvlm:
    """`Xvlm` with encoders as in `vlp_core.models.fusion.encoders.create_encoders`."""
    return Xvlm(
        **create_encoders(vision, text, concepts),
        embed_width=embed_width,
        temperature=temperature,
        heads=heads,
    )


def earlier(model: str, arguments: Mapping[str, Any]) -> Earlier | None:
    """Models that earlier versions exported: those called "xvlm", those of NLVR2 and entailment with X-VLM's
    class head, those of answers and captions that see no concepts (these named no family)."""
    if model != "xvlm":
        return shared_stage(model, arguments, class_head="mlp", concepts=False)
    heads = arguments.get("heads", HEADS)
    stage = "pretrain" if "masked_language" in heads else "retrieval" if "match" in heads else "boxes"
    return Earlier(stage, dict(arguments))


FAMILY = Family(
    name="xvlm",
    about="X-VLM: texts aligned with images, regions and objects (arXiv 2111.08276)",
    layout=LAYOUT,
    stages=(
        Stage(
            name="pretrain",
            create=create,
            starts_from=STARTS["pretrain"],
            abilities=("retrieval", "weak_grounding", "boxes"),
        ),
        Stage(
            name="retrieval",
            create=partial(create, heads=("contrast", "match")),
            starts_from=STARTS["retrieval"],
            abilities=("retrieval", "weak_grounding"),
            derive=contrast_of,
        ),
        Stage(
            name="boxes",
            create=partial(create, heads=("boxes",)),
            starts_from=STARTS["boxes"],
            abilities=("boxes",),
            derive=encoders_of,
        ),
        *shared_stages(class_head="mlp"),
    ),
    start=conversion.start,
    official=FILES.row(),
    earlier=earlier,
)
