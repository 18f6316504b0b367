"""Objects in an image, boxes with or without masks, moved along when the image is resized, cropped, mirrored
or padded.

Source: ViSFT specification 4.1; DETR datasets/transforms.py, arXiv 2005.12872. Images are resized by Pillow
with bilinear interpolation; masks are soft (0..1) and resized bilinearly, never cut to 0 and 1.

K objects   H height   W width
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from PIL import Image as Pillow
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Objects:
    """The objects of one image."""

    boxes: Tensor
    """[K, 4] float32, x0, y0, x1, y1 in pixels of the image."""
    labels: Tensor
    """[K] int64, a number for each, such as its class."""
    masks: Tensor | None = None
    """[K, H, W] float32, the share of each pixel that belongs to the object; None without masks."""

    def __post_init__(self) -> None:
        for name in ("labels", "masks"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.boxes):
                raise ValueError(f"{name} holds {len(value)} objects, boxes {len(self.boxes)}")

    @classmethod
    def none(cls, image: Pillow.Image) -> Self:
        """No objects."""
        return cls(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.boxes)

    def kept(self, chosen: Tensor) -> Self:
        """Those that `chosen` ([K] bool, or indices) names."""
        masks = None if self.masks is None else self.masks[chosen]
        return replace(self, boxes=self.boxes[chosen], labels=self.labels[chosen], masks=masks)

    def normalised(self, width: int, height: int) -> Tensor:
        """[K, 4] float32, cx, cy, w, h in 0..1 of an image of this size."""
        x0, y0, x1, y1 = self.boxes.unbind(1)
        boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=1)
        return boxes / torch.tensor([width, height, width, height], dtype=torch.float32)


def fitted(
    size: tuple[int, int], short: int, longest: int | None = None, *, down: bool = False
) -> tuple[int, int]:
    """(width, height) with the short side `short` and the aspect of `size`; where the longest side would be
    above `longest` the short side gives way, rounded, or with `down` rounded down."""
    least, most = min(size), max(size)
    if longest is not None and most / least * short > longest:
        short = longest * least // most if down else round(longest * least / most)
    width, height = (short if side == least else int(short * side / least) for side in size)
    return width, height


def jittered(size: tuple[int, int], square: int, factor: float) -> tuple[int, int]:
    """(width, height) of an image scaled to `factor` times what just fits into a square; at least 1 pixel."""
    scale = min(square * factor / size[0], square * factor / size[1])
    width, height = (max(1, round(side * scale)) for side in size)
    return width, height


def mirror(image: Pillow.Image, objects: Objects) -> tuple[Pillow.Image, Objects]:
    """Left and right exchanged."""
    x0, y0, x1, y1 = objects.boxes.unbind(1)
    boxes = torch.stack([image.width - x1, y0, image.width - x0, y1], dim=1)
    masks = None if objects.masks is None else objects.masks.flip(-1)
    return image.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT), replace(objects, boxes=boxes, masks=masks)


def resize(image: Pillow.Image, objects: Objects, size: tuple[int, int]) -> tuple[Pillow.Image, Objects]:
    """To (width, height) `size`, bilinear."""
    across, down = (new / old for new, old in zip(size, image.size, strict=True))
    boxes = objects.boxes * torch.tensor([across, down, across, down])
    masks = objects.masks
    if masks is not None:
        masks = F.interpolate(masks[:, None], (size[1], size[0]), mode="bilinear", align_corners=False)[:, 0]
    return image.resize(size, Pillow.Resampling.BILINEAR), replace(objects, boxes=boxes, masks=masks)


def crop(
    image: Pillow.Image, objects: Objects, part: tuple[int, int, int, int]
) -> tuple[Pillow.Image, Objects]:
    """The part x0, y0, x1, y1, and the objects whose box has an area in it."""
    x0, y0, x1, y1 = part
    boxes = objects.boxes - torch.tensor([x0, y0, x0, y0])
    boxes = boxes.clamp(min=0).minimum(torch.tensor([x1 - x0, y1 - y0, x1 - x0, y1 - y0]))
    masks = None if objects.masks is None else objects.masks[:, y0:y1, x0:x1]
    moved = replace(objects, boxes=boxes, masks=masks)
    return image.crop(part), moved.kept((boxes[:, 2:] > boxes[:, :2]).all(1))


def pad(
    image: Pillow.Image, objects: Objects, size: tuple[int, int], fill: int
) -> tuple[Pillow.Image, Objects]:
    """To (width, height) `size`, with grey of the value `fill` to the right and below; masks with 0."""
    if image.size == size:
        return image, objects
    padded = Pillow.new("RGB", size, (fill, fill, fill))
    padded.paste(image, (0, 0))
    masks = objects.masks
    if masks is not None:
        masks = F.pad(masks, (0, size[0] - image.width, 0, size[1] - image.height))
    return padded, replace(objects, masks=masks)


def pad_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Images [3, h, w] of any size as one batch: pixels [N, 3, H, W], with 0 to the right and below, and the
    padding mask [N, H, W] bool, True where there is no image.

    Source: DETR util/misc.py (`nested_tensor_from_tensor_list`).
    """
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pixels = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    for number, image in enumerate(images):
        pixels[number, :, : image.shape[1], : image.shape[2]] = image
        padding[number, : image.shape[1], : image.shape[2]] = False
    return pixels, padding
