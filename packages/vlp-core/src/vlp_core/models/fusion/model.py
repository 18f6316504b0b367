"""What models with two encoders and a fusion encoder do alike: features of images and texts, and pairs of
them fused.

`Xvlm` and `Vicha` are `FusionModel`s. An image stands in a pool with its row; every text row names its image,
so that keys and values of an image are computed once, however many texts look at it.

Source: ALBEF, arXiv 2107.07651 section 3; X-VLM, arXiv 2111.08276 section 3.

Shape letters: B texts of the batch, M images of a pool, S image tokens, D image width, T text tokens, W text
width, E shared embedding, P masked positions, R pairs, H levels, X texts of a pool.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_core.images import Images
from vlp_core.losses.masked_language import IGNORED
from vlp_core.losses.matching import Negatives
from vlp_core.models.fusion.encoders import require_fit
from vlp_core.precision import wide
from vlp_core.text.bert import Bert
from vlp_core.text.packing import Packing, pack
from vlp_core.vision.encoder import ImageEncoder
from vlp_core.vision.layers import take_rows

TEMPERATURE_RANGE = (0.001, 0.5)


class ImageFeatures(NamedTuple):
    """`embeds` [M, S, D]; `projection` [M, E], length one, or None in a model without the contrast head;
    `attention_mask` [M, S], 0 for tokens that nothing attends to (padding of concepts, where a model hides
    it), or None."""

    embeds: Tensor
    projection: Tensor | None
    attention_mask: Tensor | None = None


class TextFeatures(NamedTuple):
    """`embeds` [B, T, W] after the text layers, without meaning at padding; `attention_mask` [B, T];
    `projection` [B, E] or None, as for images."""

    embeds: Tensor
    attention_mask: Tensor
    projection: Tensor | None


class PairStates(NamedTuple):
    """What both encoders make of B pairs of an image (or region) and a text. Rows are pairs, in the order of
    the batch, so that states of several parts of a batch are joined row by row.

    image_embeds: [B, S, D].
    image_mask: [B, S] bool, False for tokens that nothing attends to; None where all are visible.
    text_embeds: [B, T, W] after the text layers, without meaning at padding.
    attention_mask: [B, T], 1 for real tokens.
    image_projection, text_projection: [B, E], length one.
    masked_embeds: [B, T, W] of the masked texts; None without.
    full_embeds: [N, S, D] of the whole images of regions; None where the pairs are of whole images.
    image_levels, text_levels: [B, H, E], length one: class tokens of lower blocks and layers in spaces of
        their own, lowest first; None without such a hierarchy.
    """

    image_embeds: Tensor
    image_mask: Tensor | None
    text_embeds: Tensor
    attention_mask: Tensor
    image_projection: Tensor
    text_projection: Tensor
    masked_embeds: Tensor | None = None
    full_embeds: Tensor | None = None
    image_levels: Tensor | None = None
    text_levels: Tensor | None = None

    def among(self, rows: slice, negatives: Negatives) -> "tuple[PairStates, Negatives]":
        """The pairs of `rows` as a batch of b, with the states that they are compared with behind their own.

        Negatives may lie anywhere in the batch: `image_embeds` and `text_embeds` become [2b, ...], the pairs'
        own rows first, then their negatives, and the negatives returned count in these. What nothing is
        compared with is cut to the b rows; `full_embeds` stay.
        """
        if rows == slice(0, len(self.text_embeds)):
            return self, negatives
        own = torch.arange(rows.start, rows.stop, device=self.text_embeds.device)
        images, texts = (torch.cat([own, chosen[rows]]) for chosen in negatives)
        behind = len(own) + torch.arange(len(own), device=own.device)
        return self._replace(
            image_embeds=take_rows(self.image_embeds, images),
            image_mask=None if self.image_mask is None else self.image_mask.index_select(0, images),
            text_embeds=take_rows(self.text_embeds, texts),
            attention_mask=self.attention_mask.index_select(0, texts),
            image_projection=self.image_projection[rows],
            text_projection=self.text_projection[rows],
            masked_embeds=None if self.masked_embeds is None else self.masked_embeds[rows],
            image_levels=None if self.image_levels is None else self.image_levels[rows],
            text_levels=None if self.text_levels is None else self.text_levels[rows],
        ), Negatives(behind, behind)


class FusionModel(nn.Module):
    """Two encoders and the shared space of their features; what a subclass adds as `itm_head` and `mlm_head`
    reads the fused states.

    Args:
        vision: Image encoder, or a `vlp_core.concepts.ConceptVision` around one.
        text: `Bert` with fusion layers for the width of `vision`.
        embed_width: Width of the shared embedding.
        temperature: Initial temperature of the contrastive loss, a trained parameter.
        heads: Which heads the task needs; "contrast" makes both projections and the temperature.
        known: The heads that the subclass has.

    Raises:
        ValueError: An unknown head, or a text encoder that does not fit the image encoder.
    """

    def __init__(
        self,
        *,
        vision: ImageEncoder,
        text: Bert,
        embed_width: int,
        temperature: float,
        heads: Iterable[str],
        known: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.heads = frozenset(heads)
        if unknown := sorted(self.heads - set(known)):
            raise ValueError(f"unknown heads {', '.join(unknown)}; choose among {', '.join(known)}")
        require_fit(vision, text)
        self.vision = vision
        self.text = text
        if "contrast" in self.heads:
            self.vision_proj = nn.Linear(vision.width, embed_width)
            self.text_proj = nn.Linear(text.width, embed_width)
            self.temperature = nn.Parameter(torch.tensor(temperature))

    def encode_image(self, images: Images) -> ImageFeatures:
        """Features of whole images, with their concepts where `vision` is a `ConceptVision`."""
        embeds, mask = self.vision.encode(images)
        projection = project(embeds, self.vision_proj) if "contrast" in self.heads else None
        return ImageFeatures(embeds, projection, mask)

    def encode_text(self, ids_BT: Tensor, attention_mask_BT: Tensor) -> TextFeatures:
        """Features of texts; the mask is 1 for real tokens."""
        embeds = self.text.encode(ids_BT, attention_mask_BT, skip_padding=True)
        projection = project(embeds, self.text_proj) if "contrast" in self.heads else None
        return TextFeatures(embeds, attention_mask_BT, projection)

    def match(
        self, image: ImageFeatures, text: TextFeatures, image_index_R: Tensor, text_index_R: Tensor
    ) -> Tensor:
        """Match logit (class 1) of R pairs (image_index[r], text_index[r]), [R].

        Keys and values are computed once for each image that occurs, so asking for many texts of few images
        at a time is cheap.
        """
        return self.itm_head(fuse_used(self.text, image, text, image_index_R, text_index_R))[:, 1]

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the temperature in 0.001..0.5; done in every pre-training forward, never in fine-tuning, as in
        the reference."""
        self.temperature.clamp_(*TEMPERATURE_RANGE)

    def match_pairs(self, image: ImageFeatures, text: TextFeatures, negatives: Negatives) -> Tensor:
        """Match logits of B positives, B texts with a negative image, B images with a negative text, [3B,
        2]. Pair b is image b with text b; there may be more of both than the B pairs."""
        rows = torch.arange(len(negatives.image), device=text.embeds.device)
        image_index = torch.cat([rows, negatives.image, rows])
        return self.itm_head(
            fuse_first(self.text, image, text, image_index, torch.cat([rows, rows, negatives.text]))
        )

    def encode_with_masked(self, ids_BT: Tensor, masked_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """States of the texts, then of the same texts masked, [2B, T, W]."""
        return self.text.encode(
            torch.cat([ids_BT, masked_ids_BT]),
            torch.cat([attention_mask_BT, attention_mask_BT]),
            skip_padding=True,
        )

    def encode_pairs(self, images: Images, ids_BT: Tensor, attention_mask_BT: Tensor) -> PairStates:
        """States of B images with a text each, for retrieval."""
        image = self.encode_image(images)
        text = self.encode_text(ids_BT, attention_mask_BT)
        if image.projection is None or text.projection is None:
            raise ValueError("this model has no contrast head, so its pairs have no projections")
        return PairStates(
            image_embeds=image.embeds,
            image_mask=image.attention_mask,
            text_embeds=text.embeds,
            attention_mask=attention_mask_BT,
            image_projection=image.projection,
            text_projection=text.projection,
        )

    def match_states(self, states: PairStates, negatives: Negatives) -> Tensor:
        """`match_pairs` of states."""
        return self.match_pairs(
            ImageFeatures(states.image_embeds, None, states.image_mask),
            TextFeatures(states.text_embeds, states.attention_mask, None),
            negatives,
        )

    def predict_tokens(self, masked_BPW: Tensor, labels_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [S, V] and labels [S] where there is a label, or at all places where picking them does not
        pay."""
        labelled = Packing.of(labels_BP != IGNORED)
        logits = self.mlm_head(pack(masked_BPW, labelled), self.text.word_embedding.weight)
        return logits.flatten(0, -2), pack(labels_BP, labelled).flatten()


def project(embeds: Tensor, projection: nn.Linear) -> Tensor:
    """Token 0 of [M, S, D] (or of [M, D]) in the shared space: [M, E], fp32, length one."""
    first = embeds[:, 0] if embeds.ndim == 3 else embeds
    return F.normalize(wide(projection(first)), dim=-1)


def fuse_first(
    fusion: Bert, image: ImageFeatures, text: TextFeatures, image_index_R: Tensor, text_index_R: Tensor
) -> Tensor:
    """Fused state of [CLS] for R pairs (image_index[r], text_index[r]), [R, W]; projects every image of
    `image`."""
    (first,) = fusion.fuse_and_read(
        take_rows(text.embeds, text_index_R),
        text.attention_mask.index_select(0, text_index_R),
        image.embeds,
        (text_index_R.new_zeros(len(text_index_R), 1),),
        image_mask_MS=image.attention_mask,
        image_index=image_index_R,
    )
    return first.squeeze(1)


def fuse_used(
    fusion: Bert, image: ImageFeatures, text: TextFeatures, image_index_R: Tensor, text_index_R: Tensor
) -> Tensor:
    """As `fuse_first`, projecting only the images that occur; finding them waits for the device."""
    used, image_index = image_index_R.unique(return_inverse=True)
    mask = None if image.attention_mask is None else image.attention_mask.index_select(0, used)
    return fuse_first(
        fusion, ImageFeatures(take_rows(image.embeds, used), None, mask), text, image_index, text_index_R
    )


def fuse_pairs_and_masked(
    fusion: Bert,
    states_XTW: Tensor,
    attention_mask_XT: Tensor,
    masked_BTW: Tensor,
    pool_MSD: Tensor,
    text_index_R: Tensor,
    image_index_R: Tensor,
    masked_positions_BP: Tensor,
    *,
    pool_mask_MS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fuse R pairs of the batch, and its masked texts with their own images, in one pass.

    Args:
        fusion: The text encoder, whose upper layers fuse.
        states_XTW: Texts after the text layers, the B of the batch first.
        attention_mask_XT: 1 for real tokens.
        masked_BTW: The B texts masked, after the text layers.
        pool_MSD: Images; image b belongs to text b.
        text_index_R: Text of each pair, 0..X-1.
        image_index_R: Image of each pair, a row of the pool.
        masked_positions_BP: Positions of the masked texts to read.
        pool_mask_MS: 0 for image tokens that are not visible.

    Returns:
        [CLS] of the pairs [R, W], and the masked positions [B, P, W].
    """
    rows = torch.arange(len(masked_BTW), device=states_XTW.device)
    first, masked = fusion.fuse_and_read(
        take_rows(torch.cat([states_XTW, masked_BTW]), torch.cat([text_index_R, len(states_XTW) + rows])),
        attention_mask_XT.index_select(0, torch.cat([text_index_R, rows])),
        pool_MSD,
        (text_index_R.new_zeros(len(text_index_R), 1), masked_positions_BP),
        image_mask_MS=pool_mask_MS,
        image_index=torch.cat([image_index_R, rows]),
    )
    return first.squeeze(1), masked
