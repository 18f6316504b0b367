"""The row of ViCHA and ALBEF: their stages of training and their official files.

Source: arXiv 2208.13628; ALBEF, arXiv 2107.07651.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from vlp_core.concepts import image_encoder
from vlp_core.heads import MaskedImageDecoder
from vlp_core.models.family import Earlier, Family, Stage
from vlp_core.models.fusion import conversion
from vlp_core.models.fusion.earlier import shared_stage
from vlp_core.models.fusion.encoders import create_encoders
from vlp_core.models.fusion.stages import LAYOUT, STARTS, contrast_of, shared_stages
from vlp_core.models.vicha.checkpoints import FILES
from vlp_core.models.vicha.model import HEADS, Head, Vicha


def create(
    *,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    concepts: Mapping[str, Any] | None = None,
    embed_width: int = 256,
    temperature: float = 0.07,
    heads: Iterable[Head] = HEADS,
    levels: int = 5,
    masked_image: Mapping[str, Any] | None = None,
) -> Vicha:
    """`Vicha` with encoders as in `vlp_core.models.fusion.encoders.create_encoders`.

    `masked_image`: arguments of `vlp_core.heads.MaskedImageDecoder` whose sizes are not those of the image
        encoder; None leaves masked images out.
    """
    encoders = create_encoders(vision, text, concepts)
    decoder = None
    if masked_image is not None:
        image = image_encoder(encoders["vision"])
        decoder = MaskedImageDecoder(
            image_width=image.width, patch=image.patch_size, image_size=image.image_size, **masked_image
        )
    return Vicha(
        **encoders,
        embed_width=embed_width,
        temperature=temperature,
        heads=heads,
        levels=levels,
        masked_image=decoder,
    )


def earlier(model: str, arguments: Mapping[str, Any]) -> Earlier | None:
    """Models that earlier versions exported: those called "vicha", those of NLVR2 and entailment with ALBEF's
    class head, those of answers and captions that see concepts (these named no family)."""
    if model != "vicha":
        return shared_stage(model, arguments, class_head="relu", concepts=True)
    stage = "pretrain" if "masked_language" in arguments.get("heads", HEADS) else "retrieval"
    return Earlier(stage, dict(arguments))


FAMILY = Family(
    name="vicha",
    about="ViCHA: ALBEF with concepts, hierarchy and masked images (arXiv 2208.13628, 2107.07651)",
    layout=LAYOUT,
    stages=(
        Stage(
            name="pretrain",
            create=create,
            starts_from=STARTS["pretrain"],
            abilities=("retrieval", "weak_grounding"),
        ),
        Stage(
            name="retrieval",
            create=partial(create, heads=("contrast", "match")),
            starts_from=STARTS["retrieval"],
            abilities=("retrieval", "weak_grounding"),
            derive=contrast_of,
        ),
        *shared_stages(class_head="relu"),
    ),
    start=conversion.start,
    official=FILES.row(),
    earlier=earlier,
)
