"""Visual concepts: words attached to an image that its encoder sees as tokens beside the patches.

    words  ->  ConceptEncoder (a small BERT and a linear map)  ->  K tokens  ->  behind the patches of the image encoder

`ConceptVision` makes an image encoder with concepts of an image encoder without, so that every model that has
a `vision` can have them: the fusion layers and heads attend to concept tokens as to patches. With place
"first" they stand in the sequence before the first block, as ViCHA has it, which needs an encoder that takes
other tokens (`VisionTransformer`); with "last" they are put behind the encoder's output, which any encoder
allows (Swin, whose windows have no place for them; CLIP).

Padding of a concept list is visible to image encoder and fusion layers as it is in ViCHA's checkpoints: the
features of an image depend on how far its concepts are padded, and whoever compares images pads them all to
one length. With `visible_padding=False` it is not.

Source: ViCHA, arXiv 2208.13628 section 3.3; `models/vit.py`, `models/model_pretrain_kw_img.py`.

Shape letters: N images, K concept tokens, L patches, D image width, B texts.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_core.text.bert import Bert
from vlp_core.vision.layers import VisionRegions, take_rows
from vlp_core.vision.vit import Summarised, VisionTransformer

Place = Literal["first", "last"]


class Concepts(NamedTuple):
    """The words of N images, one token sequence each: `ids` [N, K]; `attention_mask` [N, K], 1 for real
    tokens."""

    ids: Tensor
    attention_mask: Tensor


class ConceptEncoder(nn.Module):
    """From words to tokens of an image encoder.

    Args:
        text: `Bert` without fusion layers; with 0 layers only its embedding.
        width: Width of the image encoder.

    Raises:
        ValueError: A text encoder with fusion layers.
    """

    def __init__(self, *, text: Bert, width: int) -> None:
        super().__init__()
        if text.image_width is not None:
            raise ValueError(
                "the encoder of concepts attends to no image; make it without fusion_layer and image_width"
            )
        self.text = text
        self.project = nn.Linear(text.width, width)

    def forward(self, concepts: Concepts) -> Tensor:
        """[N, K, D]; also what stands at padding has a meaning where padding is visible."""
        return self.project(self.text.encode(concepts.ids, concepts.attention_mask))


class ConceptVision(nn.Module):
    """An image encoder that also sees the concepts of its images.

    Args:
        encoder: Any image encoder of `vlp_core.vision`.
        concepts: Encoder of the words, of the width of `encoder`.
        place: "first": before the first block; "last": behind the encoder's output.
        visible_padding: Whether padded places of the concept lists are attended to (the reference).

    Attributes: those of `encoder` that models use: `width`, `image_size`, `patch_size`, and `tokens`, which
        counts class token and patches.

    Raises:
        ValueError: An encoder that takes no other tokens with place "first", or an unknown place.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        concepts: ConceptEncoder,
        place: Place = "first",
        visible_padding: bool = True,
    ) -> None:
        super().__init__()
        if place not in ("first", "last"):
            raise ValueError(f"place={place!r} is not known; choose first or last")
        if place == "first" and not isinstance(encoder, VisionTransformer):
            raise ValueError(
                f"place=first puts concepts between the patches of a ViT, {type(encoder).__name__} has no place for them; use place=last"
            )
        self.encoder = encoder
        self.concepts = concepts
        self.place: Place = place
        self.visible_padding = visible_padding
        self.width: int = encoder.width
        self.image_size: int = encoder.image_size
        self.patch_size: int = encoder.patch_size
        self.tokens: int = encoder.tokens

    def forward(self, image: Tensor, concepts: Concepts) -> Tensor:
        """[N, 3, R, R] and their concepts -> [N, 1+L+K, D]."""
        others = self._tokens(image, concepts)
        if self.place == "first":
            return self.encoder(image, others, visible=self.visible(concepts))
        return torch.cat([self.encoder(image), others], dim=1)

    def forward_with_summaries(self, image: Tensor, concepts: Concepts, *, count: int) -> Summarised:
        """As `forward`, with class tokens of lower blocks; see `VisionTransformer.forward_with_summaries`."""
        others = self._tokens(image, concepts)
        if self.place == "first":
            return self.encoder.forward_with_summaries(
                image, others, count=count, visible=self.visible(concepts)
            )
        found = self.encoder.forward_with_summaries(image, count=count)
        return found._replace(embeds=torch.cat([found.embeds, others], dim=1))

    def forward_regions(
        self, image: Tensor, image_index: Tensor, image_attention_mask: Tensor, concepts: Concepts
    ) -> VisionRegions:
        """Regions of images, each followed by the concepts of its image: [B, 1+L+K, D] and [N, 1+L+K, D].

        Raises ValueError with `visible_padding=False`, which is not made for regions.
        """
        if not self.visible_padding:
            raise ValueError("visible_padding=False is not made for regions; set it to true")
        others = self._tokens(image, concepts)
        if self.place == "first":
            return self.encoder.forward_regions(image, image_index, image_attention_mask, others)
        found = self.encoder.forward_regions(image, image_index, image_attention_mask)
        return VisionRegions(
            torch.cat([found.image_embeds, take_rows(others, image_index)], dim=1),
            torch.cat([found.full_embeds, others], dim=1),
        )

    def visible(self, concepts: Concepts) -> Tensor | None:
        """What may be attended to, [N, 1+L+K] bool; None: everything."""
        if self.visible_padding:
            return None
        return F.pad(concepts.attention_mask.bool(), (self.tokens, 0), value=True)

    def _tokens(self, image: Tensor, concepts: Concepts) -> Tensor:
        if len(image) != len(concepts.ids):
            raise ValueError(f"{len(image)} images came with concepts of {len(concepts.ids)}")
        return self.concepts(concepts)


def see(vision: nn.Module, image_NCHW: Tensor, concepts: Concepts | None) -> Tensor:
    """What a model sees of images: `vision(image)`, or with its concepts.

    Raises:
        ValueError: Concepts for an encoder without them, or none for one with them.
    """
    return vision(image_NCHW) if not takes_concepts(vision, concepts) else vision(image_NCHW, concepts)


def see_groups(
    vision: nn.Module, image_NCHW: Tensor, groups: Concepts | Sequence[Concepts] | None
) -> tuple[Tensor, Tensor | None]:
    """As `see` and `visible_tokens` in one, for images whose concepts come in groups, each padded to a length
    of its own.

    Padding is visible, so a group must not be padded to the length of another: such groups pass the encoder
    one after the other, and are filled up behind their last token to one pool, where nothing attends to the
    filling.

    Args:
        vision: Image encoder.
        image_NCHW: The images of all groups, one group after the other.
        groups: Concepts of the images, in one group or several (NLVR2: of the left and the right images);
            None for an encoder without.

    Returns:
        [N, S, D] with the S of the longest list, and its mask [N, S] bool, or None where everything is
        visible.

    Raises:
        ValueError: Groups that do not add up to the images; see also `see`.
    """
    if groups is None or isinstance(groups, Concepts):
        return see(vision, image_NCHW, groups), visible_tokens(vision, groups)
    sizes = [len(group.ids) for group in groups]
    if sum(sizes) != len(image_NCHW):
        raise ValueError(f"{len(image_NCHW)} images came with concepts of {' + '.join(map(str, sizes))}")
    if len({group.ids.shape[1] for group in groups}) == 1:
        joined = Concepts(*(torch.cat(parts) for parts in zip(*groups, strict=True)))
        return see(vision, image_NCHW, joined), visible_tokens(vision, joined)
    seen = [see(vision, images, group) for images, group in zip(image_NCHW.split(sizes), groups, strict=True)]
    longest = max(embeds.shape[1] for embeds in seen)
    pool, masks = [], []
    for embeds, group in zip(seen, groups, strict=True):
        visible = visible_tokens(vision, group)
        if visible is None:
            visible = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        beyond = longest - embeds.shape[1]
        pool.append(F.pad(embeds, (0, 0, 0, beyond)))
        masks.append(F.pad(visible, (0, beyond)))
    return torch.cat(pool), torch.cat(masks)


def takes_concepts(vision: nn.Module, concepts: Concepts | None) -> bool:
    """Whether an image encoder takes concepts; refuses to go on where they are missing or one too many.

    Raises:
        ValueError: As `see`.
    """
    wanted = isinstance(vision, ConceptVision)
    if wanted and concepts is None:
        raise ValueError(
            "this model sees visual concepts beside the image; give `concepts` (data.concepts of a recipe)"
        )
    if concepts is not None and not wanted:
        raise ValueError(f"{type(vision).__name__} sees no visual concepts; leave `concepts` out")
    return wanted


def visible_tokens(vision: nn.Module, concepts: Concepts | None) -> Tensor | None:
    """The mask of what `see` gives, [N, 1+L+K] bool; None where everything is visible."""
    return vision.visible(concepts) if isinstance(vision, ConceptVision) and concepts is not None else None


def image_encoder(vision: nn.Module) -> nn.Module:
    """The image encoder itself, without concepts."""
    return vision.encoder if isinstance(vision, ConceptVision) else vision
