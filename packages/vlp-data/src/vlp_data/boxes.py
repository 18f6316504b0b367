"""Boxes and the image they belong to.

An annotation that states the size of its image says which pixels its boxes count. Where the image at hand has
another size, either it is the same picture at another scale, and the boxes are scaled, or it is another
picture (turned by a program that follows EXIF, cropped, another file of this name), and the sample is
refused.

Boxes are x0, y0, x1, y1 in pixels.
"""

import math
from dataclasses import replace
from typing import Any

from PIL import Image as Pillow

from vlp_data.errors import BadSample
from vlp_data.schema import Region, Sample

Box = tuple[float, float, float, float]


def fault(box: Box, width: float, height: float) -> str:
    """Why a box has no part in an image of this size, as the cause that it is counted by; "" if it has one.

    A box inside of the first pixel that is not all of it counts as one in fractions of the image.
    """
    x0, y0, x1, y1 = box
    if not all(map(math.isfinite, box)):
        return "box that is no number"
    if x0 >= x1 or y0 >= y1:
        return "box without area"
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        return "box outside the image"
    if min(box) >= 0 and max(box) <= 1 and not all(float(side).is_integer() for side in box):
        return "box in fractions of the image"
    return ""


def scales(stated: tuple[int, int] | None, size: tuple[int, int]) -> tuple[float, float] | None:
    """(across, down) from pixels of the stated (width, height) to those of an image of `size`; None where the
    image cannot be the same picture: its aspect is another one, by more than the rounding of one side."""
    if stated is None or stated == size:
        return 1.0, 1.0
    across, down = size[0] / stated[0], size[1] / stated[1]
    if abs(stated[0] * down - size[0]) <= 1 or abs(stated[1] * across - size[1]) <= 1:
        return across, down
    return None


def fitted(sample: Sample, image: Pillow.Image, number: int = 0) -> Sample:
    """The sample with its boxes in pixels of its decoded image `number`; the sample itself where the stated
    size is that of the image, or none is stated. Areas and polygons of masks follow; a mask as RLE has a size
    of its own and stays.

    Raises BadSample ("image of another size") where the image is no scaled copy of the annotated one.
    """
    stated = sample.images[number].size
    if stated is None or stated == image.size or not sample.regions:
        return sample
    found = scales(stated, image.size)
    if found is None:
        turned = " (turned, perhaps by EXIF)" if stated == image.size[::-1] else ""
        raise BadSample(
            "image of another size",
            sample.key,
            f"the boxes belong to an image of {stated[0]} x {stated[1]} pixels, "
            f"{sample.images[number].path or 'the image'} has {image.width} x {image.height}{turned}",
        )
    return replace(sample, regions=tuple(_scaled(region, *found) for region in sample.regions))


def _scaled(region: Region, across: float, down: float) -> Region:
    x0, y0, x1, y1 = region.box
    return replace(
        region,
        box=(x0 * across, y0 * down, x1 * across, y1 * down),
        area=None if region.area is None else region.area * across * down,
        mask=_scaled_mask(region.mask, across, down),
    )


def _scaled_mask(mask: Any, across: float, down: float) -> Any:
    if not isinstance(mask, list):
        return mask
    return [
        [side * (down if place % 2 else across) for place, side in enumerate(polygon)] for polygon in mask
    ]
