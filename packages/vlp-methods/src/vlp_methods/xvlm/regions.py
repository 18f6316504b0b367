"""The stream of regions and objects with their texts, of pre-training and of the domain stage with boxes."""

from functools import partial
from typing import Any

from vlp_core import distributed
from vlp_data.examples import RegionExamples
from vlp_data.loader import Loader
from vlp_data.options import MaskingOptions

from vlp_methods.builders.assembly import Assembly
from vlp_methods.sections.captions import RegionStream

MASKING = MaskingOptions()


def open_regions(
    made: Assembly[Any, Any], regions: RegionStream, name: str, masking: MaskingOptions = MASKING
) -> Loader[Any]:
    """This rank's share of the stream `data.<name>`. `masking` is of no matter where no token is predicted.

    Raises:
        ValueError: The ranks cannot share the batch.
    """
    world = distributed.world_size()
    if regions.texts % world or regions.images % world:
        raise ValueError(
            f"data.{name}.texts={regions.texts} and data.{name}.images={regions.images} must be multiples "
            f"of the {world} ranks"
        )
    kind = partial(
        RegionExamples,
        batch_texts=regions.texts // world,
        patch_size=made.model.vision.patch_size,
        masking=masking,
        regions=regions.options,
    )
    return made.open(kind, regions.source, name, regions.images)
