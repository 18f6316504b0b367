"""Visual concepts: words attached to an image that its encoder sees as tokens beside the patches.

    words  ->  ConceptEncoder (a small BERT and a linear map)  ->  K tokens  ->  behind the patches

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

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_core.images import Concepts, Images
from vlp_core.text.bert import Bert
from vlp_core.vision.encoder import ImageEncoder, ImageStates, Summarised
from vlp_core.vision.layers import VisionRegions, take_rows

__all__ = ["ConceptEncoder", "ConceptVision", "Concepts", "Place", "image_encoder"]

Place = Literal["first", "last"]


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


class ConceptVision(ImageEncoder):
    """An image encoder that also sees the concepts of its images.

    Args:
        encoder: Any image encoder of `vlp_core.vision`.
        concepts: Encoder of the words, of the width of `encoder`.
        place: "first": before the first block; "last": behind the encoder's output.
        visible_padding: Whether padded places of the concept lists are attended to (the reference).

    Attributes: those of `encoder`; `tokens` counts class token and patches.

    Raises:
        ValueError: An encoder that takes no other tokens with place "first", or an unknown place.
    """

    # With place "first" its modes take other tokens as well, which `ImageEncoder` does not promise.
    encoder: Any

    def __init__(
        self,
        *,
        encoder: ImageEncoder,
        concepts: ConceptEncoder,
        place: Place = "first",
        visible_padding: bool = True,
    ) -> None:
        super().__init__()
        if place not in ("first", "last"):
            raise ValueError(f"place={place!r} is not known; choose first or last")
        if place == "first" and not encoder.takes_others:
            raise ValueError(
                f"place=first puts concepts between the patches of a ViT, {encoder.called} has no place for "
                "them; use place=last"
            )
        self.encoder = encoder
        self.concepts = concepts
        self.place: Place = place
        self.visible_padding = visible_padding
        self.width = encoder.width
        self.image_size = encoder.image_size
        self.patch_size = encoder.patch_size
        self.tokens = encoder.tokens
        self.depth = encoder.depth

    def forward(self, image: Tensor, concepts: Concepts | None = None) -> Tensor:
        """[N, 3, R, R] and their concepts -> [N, 1+L+K, D]."""
        return self.encode(Images(image, concepts=concepts)).embeds

    def encode(self, images: Images) -> ImageStates:
        """Whole images with their concepts, [N, 1+L+K, D]; raises ValueError for images without."""
        concepts, alone = self._parted(images)
        others, visible = self.concepts(concepts), self.visible(concepts)
        if self.place == "first":
            return ImageStates(self.encoder(images.pixels, others, visible=visible), visible)
        embeds, mask = self.encoder.encode(alone)
        return ImageStates(torch.cat([embeds, others], dim=1), self._behind(mask, concepts))

    def encode_with_summaries(self, images: Images, *, count: int) -> Summarised:
        """As `encode`, with class tokens of lower blocks."""
        concepts, alone = self._parted(images)
        others, visible = self.concepts(concepts), self.visible(concepts)
        if self.place == "first":
            found = self.encoder.forward_with_summaries(images.pixels, others, count=count, visible=visible)
            return found._replace(mask=visible)
        embeds, summaries, mask = self.encoder.encode_with_summaries(alone, count=count)
        return Summarised(torch.cat([embeds, others], dim=1), summaries, self._behind(mask, concepts))

    def encode_regions(
        self, images: Images, image_index: Tensor, image_attention_mask: Tensor
    ) -> VisionRegions:
        """Regions of images, each followed by the concepts of its image: [B, 1+L+K, D] and [N, 1+L+K, D].

        Raises ValueError with `visible_padding=False`, which is not made for regions.
        """
        concepts, alone = self._parted(images)
        if not self.visible_padding:
            raise ValueError("visible_padding=False is not made for regions; set it to true")
        others = self.concepts(concepts)
        if self.place == "first":
            return self.encoder.forward_regions(images.pixels, image_index, image_attention_mask, others)
        found = self.encoder.encode_regions(alone, image_index, image_attention_mask)
        return VisionRegions(
            torch.cat([found.image_embeds, take_rows(others, image_index)], dim=1),
            torch.cat([found.full_embeds, others], dim=1),
        )

    def visible(self, concepts: Concepts) -> Tensor | None:
        """What may be attended to, [N, 1+L+K] bool; None: everything."""
        if self.visible_padding:
            return None
        return F.pad(concepts.attention_mask.bool(), (self.tokens, 0), value=True)

    def _parted(self, images: Images) -> tuple[Concepts, Images]:
        """The concepts, and the images without them."""
        if images.concepts is None:
            raise ValueError(
                "this model sees visual concepts beside the image; give `concepts` (data.concepts of a "
                "recipe)"
            )
        if self.place == "first":
            images.refuse("padding", "beside", by=self.called)
        return images.concepts, replace(images, concepts=None)

    def _behind(self, mask: Tensor | None, concepts: Concepts) -> Tensor | None:
        """The mask of an encoder's tokens and the concepts behind them; None: everything is visible."""
        if mask is None:
            return self.visible(concepts)
        shown = concepts.attention_mask.bool()
        return torch.cat([mask, torch.ones_like(shown) if self.visible_padding else shown], dim=1)


def image_encoder(vision: ImageEncoder) -> ImageEncoder:
    """The image encoder itself, without concepts."""
    return vision.encoder if isinstance(vision, ConceptVision) else vision
