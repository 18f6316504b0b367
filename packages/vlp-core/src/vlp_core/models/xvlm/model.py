"""X-VLM: image encoder, text encoder and fusion encoder for images, regions and objects.

One image is encoded once; every box in it is a set of its patches. A text is encoded by the lower half of
BERT, fused with an image or region by the upper half. Heads on top say whether text and visual concept match,
which tokens were masked, and where in the image the text points to. `Xvlm` serves pre-training, retrieval and
box regression (parts that a task does not need are left out); `vlp_core.models.fusion.nlvr`, `vqa` and
`captioning` hold the models of the other tasks.

What differs from the reference is the order of work, not its result: original and masked texts pass the text
layers as one batch; positives, negatives, masked texts and box queries pass the fusion layers as one batch
over one pool of images, so each image is projected to keys and values once.

Source: arXiv 2111.08276; `models/xvlm.py`, `models/model_pretrain.py`, `models/model_retrieval.py`,
`models/model_bbox.py`.

Shape letters: B texts of the batch, N images of the batch (N = B unless regions share images), M images of a
pool, L patches, D image width, T text tokens, W text width, E shared embedding, P masked positions, V
vocabulary, R pairs.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlp_core.heads import language_head, mlp_head
from vlp_core.images import Images
from vlp_core.losses.matching import Negatives, negative_weights, sample_negatives
from vlp_core.models.fusion.model import (
    FusionModel,
    ImageFeatures,
    PairStates,
    TextFeatures,
    fuse_first,
    fuse_pairs_and_masked,
    fuse_used,
    project,
)
from vlp_core.text.bert import Bert
from vlp_core.vision.encoder import ImageEncoder

Head = Literal["contrast", "match", "masked_language", "boxes"]
HEADS: tuple[Head, ...] = ("contrast", "match", "masked_language", "boxes")


class Pairs(NamedTuple):
    """What the losses of a batch of B pairs need.

    image_embeds: [B, 1+L, D]; of the region of each text in a region batch.
    text_embeds: [B, T, W], without meaning at padding.
    image_projection, text_projection: [B, E], length one.
    negatives: The pairs' negatives that were used.
    match_logits: [3B, 2]: B positives, B with a negative image, B with a negative text; class 1 is a match.
    token_logits: [S, V] at masked positions, all that have a label among them; None when no masked texts were
        given.
    token_labels: [S], -100 where there is none.
    boxes: [B, 4] predicted (cx, cy, w, h) in 0..1; None in a batch of whole images.
    full_embeds: [N, 1+L, D] of the whole images; None in a batch of whole images.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    image_projection: Tensor
    text_projection: Tensor
    negatives: Negatives
    match_logits: Tensor
    token_logits: Tensor | None
    token_labels: Tensor | None
    boxes: Tensor | None
    full_embeds: Tensor | None


class Predicted(NamedTuple):
    """What the fusion encoder says about B pairs; fields as in `Pairs`."""

    match_logits: Tensor
    token_logits: Tensor
    token_labels: Tensor
    boxes: Tensor | None


class Xvlm(FusionModel):
    """X-VLM for pre-training, retrieval and grounding.

    Args:
        vision: Image encoder; for regions one with a region mode.
        text: `Bert` with fusion layers for the width of `vision`.
        embed_width: Width of the shared embedding.
        temperature: Initial temperature of the contrastive loss, a trained parameter.
        heads: Which parts the task needs: "contrast" (both projections, temperature), "match",
            "masked_language", "boxes".

    Raises:
        ValueError: An unknown head, or a text encoder that does not fit the image encoder.
    """

    def __init__(
        self,
        *,
        vision: ImageEncoder,
        text: Bert,
        embed_width: int = 256,
        temperature: float = 0.07,
        heads: Iterable[Head] = HEADS,
    ) -> None:
        super().__init__(
            vision=vision,
            text=text,
            embed_width=embed_width,
            temperature=temperature,
            heads=heads,
            known=HEADS,
        )
        if "match" in self.heads:
            self.itm_head = mlp_head(text.width, 2)
        if "masked_language" in self.heads:
            self.mlm_head = language_head(text)
        if "boxes" in self.heads:
            self.bbox_head = mlp_head(text.width, 4)

    def locate(
        self, image: ImageFeatures, text: TextFeatures, image_index_R: Tensor, text_index_R: Tensor
    ) -> Tensor:
        """Box (cx, cy, w, h) in 0..1 of the image that each text points to, for R pairs, [R, 4]."""
        return self.bbox_head(fuse_used(self.text, image, text, image_index_R, text_index_R)).sigmoid()

    def pretrain(
        self,
        images: Images,
        text_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        masked_ids_BT: Tensor,
        masked_positions_BP: Tensor,
        masked_labels_BP: Tensor,
        *,
        image_index_B: Tensor | None = None,
        image_attention_mask_BL: Tensor | None = None,
        negatives: Negatives | None = None,
    ) -> Pairs:
        """Pre-training on a batch of whole images, or of regions when `image_index` is given. Clamps the
        temperature.

        Args:
            images: N images, with their concepts where `vision` is a `ConceptVision`.
            text_ids_BT: One text per image or region.
            attention_mask_BT: 1 for real tokens; masked texts share it.
            masked_ids_BT: The texts with tokens masked.
            masked_positions_BP: Positions to predict; unused places hold any valid position.
            masked_labels_BP: The tokens there, -100 at unused places.
            image_index_B: Image of each text.
            image_attention_mask_BL: [B, 1+L], 1 for the pooled token and the patches inside the box; required
                with `image_index`.
            negatives: Negatives to use; None draws them by similarity.
        """
        states = self.encode_pretraining(
            images,
            text_ids_BT,
            attention_mask_BT,
            masked_ids_BT,
            image_index_B=image_index_B,
            image_attention_mask_BL=image_attention_mask_BL,
        )
        self.clamp_temperature()
        if negatives is None:
            negatives = self.draw_negatives(states.image_projection, states.text_projection)
        predicted = self.predict(
            states, negatives, masked_positions_BP, masked_labels_BP, image_index_B=image_index_B
        )
        return Pairs(
            image_embeds=states.image_embeds,
            text_embeds=states.text_embeds,
            image_projection=states.image_projection,
            text_projection=states.text_projection,
            negatives=negatives,
            full_embeds=states.full_embeds,
            **predicted._asdict(),
        )

    def encode_pretraining(
        self,
        images: Images,
        text_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        masked_ids_BT: Tensor,
        *,
        image_index_B: Tensor | None = None,
        image_attention_mask_BL: Tensor | None = None,
    ) -> PairStates:
        """What the encoders make of a batch of pre-training; arguments as in `pretrain`."""
        if (image_index_B is None) != (image_attention_mask_BL is None):
            raise ValueError("image_index and image_attention_mask belong together: give both or neither")
        if image_index_B is None or image_attention_mask_BL is None:
            (embeds, mask), full = self.vision.encode(images), None
        else:
            embeds, full = self.vision.encode_regions(images, image_index_B, image_attention_mask_BL)
            mask = embeds.new_ones(embeds.shape[:2], dtype=torch.bool)
            mask[:, : image_attention_mask_BL.shape[1]] = image_attention_mask_BL.bool()
        batch = len(text_ids_BT)
        texts = self.encode_with_masked(text_ids_BT, masked_ids_BT, attention_mask_BT)
        return PairStates(
            image_embeds=embeds,
            image_mask=mask,
            text_embeds=texts[:batch],
            attention_mask=attention_mask_BT,
            image_projection=project(embeds, self.vision_proj),
            text_projection=project(texts[:batch], self.text_proj),
            masked_embeds=texts[batch:],
            full_embeds=full,
        )

    def predict(
        self,
        states: PairStates,
        negatives: Negatives,
        masked_positions_BP: Tensor,
        masked_labels_BP: Tensor,
        *,
        image_index_B: Tensor | None = None,
    ) -> Predicted:
        """What the fusion encoder says about B pairs.

        Args:
            states: Of `encode_pretraining`, or B of its pairs (`PairStates.among`).
            negatives: Rows of `states`.
            masked_positions_BP, masked_labels_BP: As in `pretrain`.
            image_index_B: Row of `states.full_embeds` for each pair; required with these.
        """
        if states.masked_embeds is None or (states.full_embeds is None) != (image_index_B is None):
            raise ValueError(
                "states of pre-training hold masked texts; image_index belongs to a region batch"
            )
        batch = len(masked_positions_BP)
        rows = torch.arange(batch, device=states.text_embeds.device)
        pool, mask = states.image_embeds, states.image_mask
        # (text row, image row) of the positives, both kinds of negatives, and box queries in a region batch.
        text_rows = [rows, rows, negatives.text]
        image_rows = [rows, negatives.image, rows]
        if states.full_embeds is not None and image_index_B is not None:
            text_rows.append(rows)
            image_rows.append(len(pool) + image_index_B)
            whole = states.full_embeds.new_ones(states.full_embeds.shape[:2], dtype=torch.bool)
            mask = None if mask is None else torch.cat([mask, whole])
            pool = torch.cat([pool, states.full_embeds])
        first, masked = fuse_pairs_and_masked(
            self.text,
            states.text_embeds,
            states.attention_mask,
            states.masked_embeds,
            pool,
            torch.cat(text_rows),
            torch.cat(image_rows),
            masked_positions_BP,
            pool_mask_MS=mask,
        )
        token_logits, token_labels = self.predict_tokens(masked, masked_labels_BP)
        return Predicted(
            match_logits=self.itm_head(first[: 3 * batch]),
            token_logits=token_logits,
            token_labels=token_labels,
            boxes=None if states.full_embeds is None else self.bbox_head(first[3 * batch :]).sigmoid(),
        )

    def pair(
        self,
        images: Images,
        text_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        *,
        identities_B: Tensor | None = None,
        negatives: Negatives | None = None,
    ) -> Pairs:
        """Retrieval fine-tuning on B images and texts; pairs of equal identity are never drawn as
        negatives."""
        states = self.encode_pairs(images, text_ids_BT, attention_mask_BT)
        if negatives is None:
            negatives = self.draw_negatives(states.image_projection, states.text_projection, identities_B)
        return Pairs(
            image_embeds=states.image_embeds,
            text_embeds=states.text_embeds,
            image_projection=states.image_projection,
            text_projection=states.text_projection,
            negatives=negatives,
            match_logits=self.match_states(states, negatives),
            token_logits=None,
            token_labels=None,
            boxes=None,
            full_embeds=None,
        )

    def regress(
        self,
        images: Images,
        text_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        image_index_B: Tensor | None = None,
    ) -> Tensor:
        """Training with boxes: what `locate` gives for text b in image b, or `image_index[b]`, without
        waiting for the device; [B, 4]."""
        rows = torch.arange(len(text_ids_BT), device=text_ids_BT.device)
        image = self.encode_image(images)
        text = self.encode_text(text_ids_BT, attention_mask_BT)
        first = fuse_first(self.text, image, text, rows if image_index_B is None else image_index_B, rows)
        return self.bbox_head(first).sigmoid()

    def draw_negatives(
        self, image_projection_BE: Tensor, text_projection_BE: Tensor, identities_B: Tensor | None = None
    ) -> Negatives:
        """Hard negatives of the local batch, by the global random generator of the device."""
        return sample_negatives(
            *negative_weights(
                image_projection_BE,
                text_projection_BE,
                temperature=self.temperature.detach(),
                ids_B=identities_B,
            )
        )
