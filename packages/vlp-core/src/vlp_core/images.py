"""Images as models take them: one value that holds the pixels and everything that belongs to them.

A model hands `Images` to its image encoder (`vlp_core.vision.ImageEncoder.encode`), which reads what it can
use and refuses the rest, so that nothing that was given is silently left out.

Shape letters: N images, H and W pixels, K tokens of a concept list.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Field = Literal["padding", "concepts", "beside"]


class Concepts(NamedTuple):
    """The words of N images, one token sequence each: `ids` [N, K]; `attention_mask` [N, K], 1 for real
    tokens."""

    ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True, eq=False)
class Images:
    """N images and what belongs to them; every tensor has a row for each image.

    Args:
        pixels: [N, 3, H, W].
        padding: [N, H, W] bool, True where a batch of different sizes has no image; None: images fill it.
        concepts: Words beside each image (`vlp_core.concepts`).
        beside: What else the image encoder of a family reads, by name.

    Raises:
        ValueError: A tensor with another number of rows than there are images.
    """

    pixels: Tensor
    padding: Tensor | None = None
    concepts: Concepts | None = None
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self._named():
            if len(tensor) != len(self.pixels):
                raise ValueError(f"{len(self.pixels)} images came with {name} of {len(tensor)}")

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def device(self) -> torch.device:
        """Where the pixels are."""
        return self.pixels.device

    def map(self, function: Callable[[Tensor], Tensor]) -> "Images":
        """New images whose tensors are `function(tensor)`."""
        return Images(
            function(self.pixels),
            None if self.padding is None else function(self.padding),
            None if self.concepts is None else Concepts(*map(function, self.concepts)),
            {name: function(tensor) for name, tensor in self.beside.items()},
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Images":
        """The images on another device; types of numbers stay."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def detach(self) -> "Images":
        """The same numbers, through which no gradient flows."""
        return self.map(Tensor.detach)

    def rows(self, index: Tensor | slice) -> "Images":
        """Some of the images: a slice, or [R] numbers of images (or [N] bool)."""
        return self.map(lambda tensor: tensor[index])

    def split(self, sizes: int | Sequence[int]) -> "tuple[Images, ...]":
        """Successive groups of images: of so many each (the last may be smaller), or of these sizes.

        Raises:
            ValueError: Sizes that do not add up to the number of images.
        """
        count = len(self)
        if isinstance(sizes, int):
            if sizes < 1:
                raise ValueError(f"images cannot be split into groups of {sizes}")
            sizes = [min(sizes, count - start) for start in range(0, count, sizes)]
        if sum(sizes) != count:
            raise ValueError(f"{count} images cannot be split into groups of {' + '.join(map(str, sizes))}")
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        return tuple(self.rows(slice(start, start + size)) for start, size in zip(starts, sizes, strict=True))

    @staticmethod
    def cat(groups: "Sequence[Images]") -> "Images":
        """The images of all groups, one group after the other.

        Raises:
            ValueError: No group, or groups of which only some have padding, concepts or a name of `beside`,
                or whose tensors differ in shape. Concepts of different lengths are not padded to one, because
                an encoder may see how far they are padded; `vlp_core.vision.encode_groups` encodes such
                groups.
        """
        if not groups:
            raise ValueError("no images were given to join")
        if len(groups) == 1:
            return groups[0]
        named = [dict(images._named()) for images in groups]
        for name in sorted(set().union(*named)):
            if any(name not in tensors for tensors in named):
                raise ValueError(f"only some of the images to join have {name}")
            shapes = {tuple(tensors[name].shape[1:]) for tensors in named}
            if len(shapes) > 1:
                found = " and ".join(str(list(shape)) for shape in sorted(shapes))
                raise ValueError(
                    f"images to join differ in the shape of {name}: {found} for each image; "
                    "make them equal, or encode the groups one by one"
                )
        first = groups[0]
        return Images(
            torch.cat([images.pixels for images in groups]),
            None if first.padding is None else torch.cat([tensors["padding"] for tensors in named]),
            None
            if first.concepts is None
            else Concepts(
                torch.cat([tensors["concepts"] for tensors in named]),
                torch.cat([tensors["the mask of concepts"] for tensors in named]),
            ),
            {name: torch.cat([images.beside[name] for images in groups]) for name in first.beside},
        )

    def refuse(self, *fields: Field, by: str) -> None:
        """Raise where a field was given that cannot take effect.

        Args:
            fields: Names of fields that the caller does not read.
            by: Name of the caller, for the message.

        Raises:
            ValueError: One of the fields holds something.
        """
        if "padding" in fields and self.padding is not None:
            raise ValueError(
                f"{by} takes images that fill their batch; leave `padding` out (choose a view without "
                "padding)"
            )
        if "concepts" in fields and self.concepts is not None:
            raise ValueError(f"{by} sees no visual concepts; leave `concepts` out")
        if "beside" in fields and self.beside:
            raise ValueError(
                f"{by} reads nothing beside the pixels; leave {', '.join(sorted(self.beside))} out of "
                "`beside`"
            )

    def _named(self) -> list[tuple[str, Tensor]]:
        """All tensors with what messages call them."""
        found = [("pixels", self.pixels)]
        if self.padding is not None:
            found.append(("padding", self.padding))
        if self.concepts is not None:
            found.append(("concepts", self.concepts.ids))
            found.append(("the mask of concepts", self.concepts.attention_mask))
        return [*found, *((f"beside[{name!r}]", tensor) for name, tensor in self.beside.items())]
