"""ViCHA: ALBEF with visual concepts, hierarchical image-text alignment and masked image modelling.

Two encoders and a fusion encoder (`vlp_core.models.fusion.model`), trained beside a momentum teacher
(`vlp_core.momentum`). Three additions to ALBEF, each of which can be left out:

    visual concepts  `vision` is a `vlp_core.concepts.ConceptVision`: words chosen for the image stand beside
                     its patches, in every task
    hierarchy        "hidden" among the heads: class tokens of lower image blocks meet those of lower text
                     layers in spaces of their own
    masked images    `masked_image`: patches of the image are removed, and the image encoder predicts them

Without all three it is ALBEF. What differs from the reference is the order of work, not its result: original
and masked texts pass the text layers as one batch; positives, negatives and masked texts pass the fusion
layers as one batch over one pool of images; vocabulary logits exist at masked positions only, for student and
teacher; removed patches are never projected.

Source: arXiv 2208.13628 section 3; `models/model_pretrain_kw_img.py`, `models/model_retrieval_kw_img.py`;
ALBEF, arXiv 2107.07651.

Shape letters: B pairs of the batch, S image tokens (class, patches, concepts), L patches, D image width, T
text tokens, W text width, E shared embedding, H levels of the hierarchy, P masked positions, V vocabulary, C
numbers of a patch, R pairs.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import vlp_ops
from torch import Tensor, nn

from vlp_core.concepts import image_encoder
from vlp_core.heads import MaskedImageDecoder, language_head
from vlp_core.images import Images
from vlp_core.losses.masked_image import patch_targets
from vlp_core.losses.matching import Negatives, negative_weights, sample_negatives
from vlp_core.models.fusion.model import FusionModel, PairStates, fuse_pairs_and_masked, project
from vlp_core.text.bert import Bert
from vlp_core.vision.encoder import ImageEncoder

Head = Literal["contrast", "match", "masked_language", "hidden"]
HEADS: tuple[Head, ...] = ("contrast", "match", "masked_language", "hidden")

NOT_TAUGHT = (
    "temperature",
    "itm_head",
    "vision_proj_hidden",
    "text_proj_hidden",
    "masked_image",
)
"""Parts that a momentum teacher does not have."""


class Taught(NamedTuple):
    """What a teacher makes of a batch: projections [B, E], and token logits at the same places as the
    student's, or None."""

    image_projection: Tensor
    text_projection: Tensor
    token_logits: Tensor | None


class PredictedPatches(NamedTuple):
    """Masked image modelling: `predicted` [N, L, C] by the decoder and `fused` by the fusion layers, each
    None where it is not asked for; `targets` [N, L, C]; `removed` [N, L], 1 for patches to predict."""

    predicted: Tensor | None
    fused: Tensor | None
    targets: Tensor
    removed: Tensor


class Pairs(NamedTuple):
    """What the losses of a batch of B pairs need.

    image_embeds: [B, S, D].
    text_embeds: [B, T, W], without meaning at padding.
    image_projection, text_projection: [B, E], length one.
    hidden_image, hidden_text: [H, B, E], length one, lowest level first; None without hierarchy.
    negatives: The pairs' negatives that were used.
    match_logits: [3B, 2]: B positives, B with a negative image, B with a negative text; class 1 is a match.
    token_logits: [S', V] at masked positions, all that have a label among them; None when no masked texts
        were given.
    token_labels: [S'], -100 where there is none.
    patches: Predictions of removed patches, or None.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    image_projection: Tensor
    text_projection: Tensor
    hidden_image: Tensor | None
    hidden_text: Tensor | None
    negatives: Negatives
    match_logits: Tensor
    token_logits: Tensor | None
    token_labels: Tensor | None
    patches: PredictedPatches | None


class Predicted(NamedTuple):
    """What the fusion encoder says about B pairs, and predictions of removed patches; fields as in
    `Pairs`."""

    match_logits: Tensor
    token_logits: Tensor
    token_labels: Tensor
    patches: PredictedPatches | None


class Vicha(FusionModel):
    """ViCHA and ALBEF for pre-training, retrieval and weakly supervised grounding.

    Args:
        vision: Image encoder, or a `ConceptVision` around one; hierarchy and masked images need a ViT.
        text: `Bert` with fusion layers for the width of `vision`.
        embed_width: Width of the shared embedding.
        temperature: Initial temperature of the contrastive losses, a trained parameter.
        heads: Which parts the task needs: "contrast" (both projections, temperature), "match",
            "masked_language", "hidden" (hierarchy).
        levels: Levels of the hierarchy, H: image blocks and text layers just below the last one.
        masked_image: Masked image modelling; None leaves it out.

    Raises:
        ValueError: An unknown head, parts that do not fit together.
    """

    def __init__(
        self,
        *,
        vision: ImageEncoder,
        text: Bert,
        embed_width: int = 256,
        temperature: float = 0.07,
        heads: Iterable[Head] = HEADS,
        levels: int = 5,
        masked_image: MaskedImageDecoder | None = None,
    ) -> None:
        super().__init__(
            vision=vision,
            text=text,
            embed_width=embed_width,
            temperature=temperature,
            heads=heads,
            known=HEADS,
        )
        encoder = image_encoder(vision)
        impossible = ("hidden" in self.heads and not encoder.depth) or (
            masked_image is not None and not encoder.keeps_patches
        )
        if impossible:
            raise ValueError(
                f"hierarchy and masked images need a ViT, {encoder.called} has no blocks of one width; leave "
                "both out"
            )
        if "match" in self.heads:
            self.itm_head = nn.Linear(text.width, 2)
        if "masked_language" in self.heads:
            self.mlm_head = language_head(text)
        if "hidden" in self.heads:
            blocks, layers = encoder.depth, text.fusion_layer
            if not 0 < levels < blocks or levels > layers:
                raise ValueError(
                    f"levels={levels} of the hierarchy need more image blocks than that ({blocks}) and as "
                    f"many text layers ({layers})"
                )
            self.vision_proj_hidden = nn.ModuleList(
                nn.Linear(vision.width, embed_width) for _ in range(levels)
            )
            self.text_proj_hidden = nn.ModuleList(nn.Linear(text.width, embed_width) for _ in range(levels))
        if masked_image is not None:
            if masked_image.by != "decoder" and text.width != vision.width:
                raise ValueError(
                    f"by={masked_image.by}: the fusion layers look at patches as at words and at words as at "
                    "patches, so the widths of image "
                    f"and text, {vision.width} and {text.width}, must be equal"
                )
            self.masked_image = masked_image

    @torch.no_grad()
    def teach(
        self,
        images: Images,
        text_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        masked_ids_BT: Tensor | None = None,
        masked_positions_BP: Tensor | None = None,
        masked_labels_BP: Tensor | None = None,
    ) -> Taught:
        """What this model, as a momentum teacher (`vlp_core.momentum.teacher_of` without `NOT_TAUGHT`), makes
        of a batch.

        Arguments as in `pretrain`; without masked texts there are no token logits.
        """
        image = self.encode_image(images)
        if masked_ids_BT is None or masked_positions_BP is None or masked_labels_BP is None:
            text = self.encode_text(text_ids_BT, attention_mask_BT)
            return Taught(image.projection, text.projection, None)
        batch = len(text_ids_BT)
        states = self.encode_with_masked(text_ids_BT, masked_ids_BT, attention_mask_BT)
        (masked,) = self.text.fuse_and_read(
            states[batch:],
            attention_mask_BT,
            image.embeds,
            (masked_positions_BP,),
            image_mask_MS=image.attention_mask,
        )
        return Taught(
            image.projection,
            project(states[:batch], self.text_proj),
            self.predict_tokens(masked, masked_labels_BP)[0],
        )

    def pretrain(
        self,
        images: Images,
        text_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        masked_ids_BT: Tensor,
        masked_positions_BP: Tensor,
        masked_labels_BP: Tensor,
        *,
        taught: Taught,
        negatives: Negatives | None = None,
        patch_noise_BL: Tensor | None = None,
    ) -> Pairs:
        """Pre-training on B images with a text each. Clamps the temperature.

        Args:
            images: B images, with their concepts where `vision` is a `ConceptVision`.
            text_ids_BT: One text per image.
            attention_mask_BT: 1 for real tokens; masked texts share it.
            masked_ids_BT: The texts with tokens masked.
            masked_positions_BP: Positions to predict; unused places hold any valid position.
            masked_labels_BP: The tokens there, -100 at unused places.
            taught: What the teacher makes of the batch; its features decide which negatives are hard.
            negatives: Negatives to use; None draws them.
            patch_noise: Numbers to sort patches by, the smallest are kept; None draws them.
        """
        self.clamp_temperature()
        states = self.encode_pretraining(images, text_ids_BT, attention_mask_BT, masked_ids_BT)
        if negatives is None:
            negatives = self.draw_negatives(states.image_projection, states.text_projection, taught)
        predicted = self.predict(
            states,
            negatives,
            images,
            masked_positions_BP,
            masked_labels_BP,
            patch_noise_BL=patch_noise_BL,
        )
        hidden_image, hidden_text = (
            None if levels is None else levels.transpose(0, 1)
            for levels in (states.image_levels, states.text_levels)
        )
        return Pairs(
            image_embeds=states.image_embeds,
            text_embeds=states.text_embeds,
            image_projection=states.image_projection,
            text_projection=states.text_projection,
            hidden_image=hidden_image,
            hidden_text=hidden_text,
            negatives=negatives,
            **predicted._asdict(),
        )

    def encode_pretraining(
        self, images: Images, text_ids_BT: Tensor, attention_mask_BT: Tensor, masked_ids_BT: Tensor
    ) -> PairStates:
        """What the encoders make of a batch of pre-training; arguments as in `pretrain`."""
        batch = len(text_ids_BT)
        image_levels = text_levels = None
        if "hidden" in self.heads:
            levels = len(self.vision_proj_hidden)
            embeds, image_summaries, mask = self.vision.encode_with_summaries(images, count=levels)
            texts, text_summaries = self.text.encode_with_summaries(
                torch.cat([text_ids_BT, masked_ids_BT]),
                torch.cat([attention_mask_BT, attention_mask_BT]),
                count=levels,
                rows=batch,
                skip_padding=True,
            )
            image_levels = _project_each(self.vision_proj_hidden, image_summaries)
            text_levels = _project_each(self.text_proj_hidden, text_summaries)
        else:
            embeds, mask = self.vision.encode(images)
            texts = self.encode_with_masked(text_ids_BT, masked_ids_BT, attention_mask_BT)
        return PairStates(
            image_embeds=embeds,
            image_mask=mask,
            text_embeds=texts[:batch],
            attention_mask=attention_mask_BT,
            image_projection=project(embeds, self.vision_proj),
            text_projection=project(texts[:batch], self.text_proj),
            masked_embeds=texts[batch:],
            image_levels=image_levels,
            text_levels=text_levels,
        )

    def predict(
        self,
        states: PairStates,
        negatives: Negatives,
        images: Images,
        masked_positions_BP: Tensor,
        masked_labels_BP: Tensor,
        *,
        patch_noise_BL: Tensor | None = None,
    ) -> Predicted:
        """What the fusion encoder says about B pairs, and the patches that are removed from their images.

        Args:
            states: Of `encode_pretraining`, or B of its pairs (`PairStates.among`).
            negatives: Rows of `states`.
            images: The B images.
            masked_positions_BP, masked_labels_BP, patch_noise_BL: As in `pretrain`.
        """
        if states.masked_embeds is None:
            raise ValueError("no masked texts were given, so there is no token to predict")
        batch = len(images)
        rows = torch.arange(batch, device=states.text_embeds.device)
        first, masked = fuse_pairs_and_masked(
            self.text,
            states.text_embeds,
            states.attention_mask,
            states.masked_embeds,
            states.image_embeds,
            torch.cat([rows, rows, negatives.text]),
            torch.cat([rows, negatives.image, rows]),
            masked_positions_BP,
            pool_mask_MS=states.image_mask,
        )
        patches = None
        if hasattr(self, "masked_image"):
            patches = self._predict_patches(
                images.pixels, states.text_embeds[:batch], states.attention_mask[:batch], patch_noise_BL
            )
        token_logits, token_labels = self.predict_tokens(masked, masked_labels_BP)
        return Predicted(self.itm_head(first), token_logits, token_labels, patches)

    def pair(
        self,
        images: Images,
        text_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        *,
        taught: Taught,
        identities_B: Tensor | None = None,
        negatives: Negatives | None = None,
    ) -> Pairs:
        """Retrieval fine-tuning on B images and texts; pairs of equal identity are never drawn as negatives.
        Clamps nothing."""
        states = self.encode_pairs(images, text_ids_BT, attention_mask_BT)
        if negatives is None:
            negatives = self.draw_negatives(
                states.image_projection, states.text_projection, taught, identities_B
            )
        return Pairs(
            image_embeds=states.image_embeds,
            text_embeds=states.text_embeds,
            image_projection=states.image_projection,
            text_projection=states.text_projection,
            hidden_image=None,
            hidden_text=None,
            negatives=negatives,
            match_logits=self.match_states(states, negatives),
            token_logits=None,
            token_labels=None,
            patches=None,
        )

    def draw_negatives(
        self,
        image_projection_BE: Tensor,
        text_projection_BE: Tensor,
        taught: Taught,
        identities_B: Tensor | None = None,
    ) -> Negatives:
        """Hard negatives of the local batch, similar to the teacher's features, by the global random
        generator of the device."""
        return sample_negatives(
            *negative_weights(
                image_projection_BE,
                text_projection_BE,
                temperature=self.temperature.detach(),
                ids_B=identities_B,
                image_keys_BE=taught.image_projection,
                text_keys_BE=taught.text_projection,
                floor=0.0,
            )
        )

    def _predict_patches(
        self,
        image_BCHW: Tensor,
        text_states_BTW: Tensor,
        attention_mask_BT: Tensor,
        noise_BL: Tensor | None,
    ) -> PredictedPatches:
        encoder, head = image_encoder(self.vision), self.masked_image
        pixels = encoder.split_patches(image_BCHW)
        kept, removed, ids_restore, ids_keep = vlp_ops.random_masking(pixels, head.ratio, noise=noise_BL)
        states = encoder.forward_kept(kept, ids_keep)
        predicted = head.decode(states, ids_restore) if head.by != "fusion" else None
        fused = None
        if head.by != "decoder":
            patches = head.place(states, ids_restore)
            looked = self.text.fuse(patches, None, text_states_BTW, image_mask_MS=attention_mask_BT)
            fused = head.project_fused(looked[:, 1:])
        return PredictedPatches(predicted, fused, patch_targets(image_BCHW, head.patch_size), removed)


def _project_each(projections: nn.ModuleList, summaries_HBD: Tensor) -> Tensor:
    return torch.stack(
        [project(level, linear) for linear, level in zip(projections, summaries_HBD, strict=True)], dim=1
    )
