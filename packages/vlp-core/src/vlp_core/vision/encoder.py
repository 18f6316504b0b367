"""What every image encoder offers, and what a model may ask of it.

    encode            whole images: `Images` in, states and a mask out; what cannot take effect is refused
    encode_regions    a row for each text, of the region of its image (X-VLM)
    encode_with_summaries   also the class token after lower blocks (hierarchical alignment of ViCHA)
    forward...        the same modes on tensors alone

An encoder implements `forward` and the modes that its architecture permits; the others raise `ValueError` in
words. An encoder that reads more than pixels (`vlp_core.concepts.ConceptVision`) implements `encode...` too.

Shape letters: B texts, N images, R image side, L patches, T image tokens, D width, K kept patches, S
summaries, P patch side.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from vlp_core.images import Images
from vlp_core.vision.layers import VisionRegions, split_patches


class ImageStates(NamedTuple):
    """`embeds` [N, T, D], token 0 stands for the whole image; `mask` [N, T] bool, False for tokens that
    nothing attends to, or None where everything is visible."""

    embeds: Tensor
    mask: Tensor | None = None


class Summarised(NamedTuple):
    """`embeds` [N, T, D]; `summaries` [S, N, D]: the class token after some of the blocks, normalised, lowest
    block first; `mask` as in `ImageStates`."""

    embeds: Tensor
    summaries: Tensor
    mask: Tensor | None = None


class ImageEncoder(nn.Module):
    """Base of image encoders.

    Attributes:
        width: Channels of the output, D.
        image_size: Side of the images in pixels.
        patch_size: Side of a patch of the output in pixels.
        tokens: Tokens of the output, 1 + L: one for the whole image, then the patches row by row.
        depth: Number of blocks of one width with a class token, which `forward_with_summaries` can read; 0
            for an architecture without.
        keeps_patches: Whether there is `forward_kept`.
        takes_others: Whether `forward` and the other modes take tokens that stand beside the patches, as
            `vlp_core.vision.VisionTransformer` does.
    """

    width: int
    image_size: int
    patch_size: int
    tokens: int
    depth: int = 0
    keeps_patches: bool = False
    takes_others: bool = False
    # `nn.Module` has it; said for type checkers, which know nothing of torch here.
    __call__: Callable[..., Tensor]

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, R, R] -> [N, T, D]."""
        raise NotImplementedError(f"{type(self).__name__} implements no `forward`")

    def encode(self, images: Images) -> ImageStates:
        """Whole images.

        Raises:
            ValueError: Images with padding, concepts or more beside them, where the encoder has no use for
                them; images of another size.
        """
        self._refuse(images)
        return ImageStates(self(images.pixels))

    def encode_regions(
        self, images: Images, image_index: Tensor, image_attention_mask: Tensor
    ) -> VisionRegions:
        """Regions of images; arguments as in `forward_regions`, errors also as in `encode`."""
        self._refuse(images)
        return self.forward_regions(images.pixels, image_index, image_attention_mask)

    def encode_with_summaries(self, images: Images, *, count: int) -> Summarised:
        """Whole images with class tokens of lower blocks; as `forward_with_summaries`, errors also as in
        `encode`."""
        self._refuse(images)
        return self.forward_with_summaries(images.pixels, count=count)

    def forward_regions(
        self, image: Tensor, image_index: Tensor, image_attention_mask: Tensor
    ) -> VisionRegions:
        """Regions of images.

        Args:
            image: [N, 3, R, R].
            image_index: [B], the image of each text.
            image_attention_mask: [B, 1+L], 1 for patches of the region; column 0 is 1.

        Raises:
            ValueError: An architecture without this mode, or shapes that do not fit.
        """
        raise ValueError(f"{self.called} has no region mode; train it on whole images only")

    def forward_with_summaries(self, image: Tensor, *, count: int) -> Summarised:
        """As `forward`, with the class token after each of the `count` blocks before the last one.

        Raises:
            ValueError: An architecture without this mode, or without so many blocks.
        """
        raise ValueError(f"{self.called} has no class token after each of its blocks, so it has no summaries")

    def forward_kept(self, patches_NKP: Tensor, ids_NK: Tensor) -> Tensor:
        """States of a part of the patches, class token first: [N, 1+K, D].

        Args:
            patches_NKP: The kept ones, as `split_patches` gives them.
            ids_NK: Their numbers, row by row.

        Raises:
            ValueError: An architecture without this mode.
        """
        raise ValueError(f"{self.called} cannot leave patches out; masked images need a plain ViT")

    def split_patches(self, image: Tensor) -> Tensor:
        """Patches as rows of numbers, channel by channel: [N, 3, R, R] -> [N, L, 3*P*P]."""
        return split_patches(image, self.patch_size).flatten(1, 2)

    def position_tables(self) -> dict[str, Callable[[Tensor, Size], Tensor]]:
        """Names of parameters that have the size of the image, with the function(tensor, wanted shape) that
        resizes one of another size."""
        return {}

    @property
    def called(self) -> str:
        """What messages call this encoder."""
        return type(self).__name__

    def _refuse(self, images: Images) -> None:
        images.refuse("padding", "concepts", "beside", by=self.called)


def encode_groups(vision: ImageEncoder, groups: Sequence[Images]) -> ImageStates:
    """Several groups of images as one pool, one group after the other (NLVR2: the left and the right images).

    Groups of one layout pass the encoder as one batch. Groups that differ (an image's features may depend on
    how far its concepts are padded, so a group is not padded to the length of another) pass it one after the
    other; shorter ones are filled up behind their last token, where nothing attends to the filling.

    Args:
        vision: Image encoder.
        groups: At least one.

    Returns:
        [N, T, D] with the T of the longest group, and its mask, or None where everything is visible.

    Raises:
        ValueError: No group; see also `ImageEncoder.encode`.
    """
    if len({_layout(images) for images in groups}) <= 1:
        return vision.encode(Images.cat(groups))
    states = [vision.encode(images) for images in groups]
    longest = max(embeds.shape[1] for embeds, _ in states)
    pool, masks = [], []
    for embeds, mask in states:
        visible = embeds.new_ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask
        beyond = longest - embeds.shape[1]
        pool.append(F.pad(embeds, (0, 0, 0, beyond)))
        masks.append(F.pad(visible, (0, beyond)))
    return ImageStates(torch.cat(pool), torch.cat(masks))


def _layout(images: Images) -> tuple[object, ...]:
    """What images of one batch have in common."""
    return (
        images.pixels.shape[1:],
        None if images.padding is None else images.padding.shape[1:],
        None if images.concepts is None else images.concepts.ids.shape[1:],
        tuple(sorted((name, tensor.shape[1:]) for name, tensor in images.beside.items())),
    )
