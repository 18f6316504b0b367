"""Two images and a sentence (NLVR2): the fusion layers look at the first and the second image in turn.

Source: arXiv 2107.07651 appendix A, arXiv 2111.08276; X-VLM `models/model_nlvr.py`,
`models/model_nlvr_pretrain.py`; ViCHA `models/model_nlvr_kw_img.py`, `models/model_pretrain_nlvr_kw_img.py`.

Shape letters: B texts, N images, L image tokens (class, patches, concepts), D image width, T text tokens, E
shared embedding, K classes.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_core.concepts import ConceptVision
from vlp_core.heads import ClassHead, class_head
from vlp_core.images import Images
from vlp_core.models.fusion.encoders import require_fit
from vlp_core.text.bert import Bert
from vlp_core.vision.encoder import ImageEncoder, ImageStates, encode_groups

Stage = Literal["domain", "fine_tune"]

ASSIGNMENT_TEMPERATURE = 0.07
ALONE = 1 / 3
"""Share of the texts of the domain stage that stand beside two images of others."""


class Assignment(NamedTuple):
    """Images of B texts in the domain stage, as rows of the batch, and which of them the text describes.

    `labels`: 0 the first, 1 the second, 2 none of both.
    """

    first: Tensor
    second: Tensor
    labels: Tensor


class NlvrModel(nn.Module):
    """Classifies a text beside two images.

    Args:
        vision: Image encoder.
        text: `Bert` with twice the fusion layers and `layers_per_image_projection=2`.
        stage: "domain": three classes (text fits the first image, the second, none) by a linear layer, with a
            vision projection that finds negatives; "fine_tune": two classes (false, true) by a small
            classifier.
        embed_width: Width of the vision projection of the domain stage.
        head: Classifier of the stage "fine_tune": "mlp" is X-VLM's, "relu" that of ALBEF and ViCHA.

    Raises:
        ValueError: An unknown stage or head, or a text encoder that does not fit the image encoder.
    """

    def __init__(
        self,
        *,
        vision: ImageEncoder,
        text: Bert,
        stage: Stage = "fine_tune",
        embed_width: int = 256,
        head: ClassHead = "mlp",
    ) -> None:
        super().__init__()
        if stage not in ("domain", "fine_tune"):
            raise ValueError(f"stage {stage!r} is not known; choose domain or fine_tune")
        require_fit(vision, text)
        self.vision = vision
        self.text = text
        self.stage: Stage = stage
        if stage == "domain":
            self.vision_proj = nn.Linear(vision.width, embed_width)
            self.ta_head = nn.Linear(text.width, 3)
        else:
            self.cls_head = class_head(head, text.width, 2)

    def encode(self, *groups: Images) -> ImageStates:
        """The pool of all N images, one group after the other: [N, L, D], and which of its tokens are
        visible.

        Groups are for example the left and the right images; each may have concepts padded to a length of its
        own, see `vlp_core.vision.encode_groups`.
        """
        return encode_groups(self.vision, groups)

    def forward(
        self,
        groups: Sequence[Images],
        first_B: Tensor,
        second_B: Tensor,
        ids_BT: Tensor,
        attention_mask_BT: Tensor,
    ) -> Tensor:
        """Class logits [B, K] of texts with the images `first[b]` and `second[b]` of the pool of all groups:
        `encode`, then `classify`."""
        pool, visible = self.encode(*groups)
        return self.classify(pool, first_B, second_B, ids_BT, attention_mask_BT, visible)

    def classify(
        self,
        embeds_NLD: Tensor,
        first_B: Tensor,
        second_B: Tensor,
        ids_BT: Tensor,
        attention_mask_BT: Tensor,
        pool_mask_NL: Tensor | None = None,
    ) -> Tensor:
        """As `forward`, for images already encoded; `pool_mask` is 0 or False for image tokens that nothing
        attends to."""
        states = self.text.encode(ids_BT, attention_mask_BT, skip_padding=True)
        (state,) = self.text.fuse_and_read(
            states,
            attention_mask_BT,
            embeds_NLD,
            (ids_BT.new_zeros(len(ids_BT), 1),),
            image_mask_MS=pool_mask_NL,
            image_index=(first_B, second_B),
        )
        head = self.ta_head if self.stage == "domain" else self.cls_head
        return head(state.squeeze(1))

    def project(self, embeds_NLD: Tensor) -> Tensor:
        """Images in the shared space, [N, E], length one, fp32, without gradient: the domain stage does not
        train `vision_proj`.

        Its parameters never get a gradient.
        """
        with torch.no_grad():
            return F.normalize(self.vision_proj(embeds_NLD[:, 0]).float(), dim=-1)

    def assignment_pairs(self, embeds_BLD: Tensor, *, generator: torch.Generator | None = None) -> Assignment:
        """Draw the two images of each text of a batch in which text b describes image b.

        Two texts of three stand beside their own image, at either place equally often, and one similar image;
        the others beside two similar ones. Similar images are drawn by `assignment_weights`.

        Raises:
            ValueError: Fewer than three images: no two others can be drawn.
        """
        weights = assignment_weights(self.project(embeds_BLD))
        picked = torch.multinomial(weights, 2, generator=generator)
        uniform = torch.rand(2, len(weights), device=weights.device, generator=generator)
        return assign(picked, pair_uniform_B=uniform[0], order_uniform_B=uniform[1])


@torch.no_grad()
def released_pool(model: NlvrModel, teacher: NlvrModel, *groups: Images) -> ImageStates:
    """As `NlvrModel.encode`, what the momentum teacher of the released ViCHA looks at: the teacher's concepts
    by the model's own image encoder.

    By name the reference has a momentum image encoder and moves it, but never asks it; `teacher.encode` does.
    """
    vision = model.vision
    if isinstance(vision, ConceptVision):
        vision = ConceptVision(
            encoder=vision.encoder,
            concepts=teacher.vision.concepts,
            place=vision.place,
            visible_padding=vision.visible_padding,
        )
    return encode_groups(vision, groups)


def assignment_weights(projection_BE: Tensor) -> Tensor:
    """Weights [B, B] for drawing other images for each image: softmax(cosine / 0.07) with a zero diagonal.

    Raises:
        ValueError: Fewer than three images.
    """
    if len(projection_BE) < 3:
        raise ValueError(
            f"a batch of {len(projection_BE)} images has no two others for each: the domain stage needs at "
            "least 3 per rank"
        )
    with torch.no_grad(), torch.autocast(projection_BE.device.type, enabled=False):
        projection = projection_BE.float()
        weights = (projection @ projection.t() / ASSIGNMENT_TEMPERATURE).softmax(1)
        # NaN features must show up in the loss, where the engine looks for them, not as an assertion of the
        # drawing kernel.
        weights = torch.where(weights.isfinite(), weights, 1.0)
        return weights.fill_diagonal_(0.0)


def assign(picked_B2: Tensor, *, pair_uniform_B: Tensor, order_uniform_B: Tensor) -> Assignment:
    """Images and labels from two other images of each text and two uniform numbers in 0..1.

    `pair_uniform` above 1/3: own image and `picked[:, 0]`, the own one first (label 0) where `order_uniform`
    is above 0.5, else second (label 1); otherwise both picked ones (label 2).
    """
    own = torch.arange(len(picked_B2), device=picked_B2.device)
    paired, first = pair_uniform_B > ALONE, order_uniform_B > 0.5
    return Assignment(
        first=torch.where(paired & first, own, picked_B2[:, 0]),
        second=torch.where(paired, torch.where(first, picked_B2[:, 0], own), picked_B2[:, 1]),
        labels=torch.where(paired, torch.where(first, 0, 1), 2),
    )
