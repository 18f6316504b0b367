"""Does an image entail a sentence (SNLI-VE)? One state of the fused sentence, classified.

Source: ALBEF, arXiv 2107.07651 section 4; ViCHA `models/model_ve_kw_img.py`.

Shape letters: B pairs, L image tokens (class, patches, concepts), D image width, T text tokens, C classes.
"""

from torch import Tensor, nn

from vlp_core.heads import ClassHead, class_head
from vlp_core.images import Images
from vlp_core.models.fusion.encoders import require_fit
from vlp_core.text.bert import Bert
from vlp_core.vision.encoder import ImageEncoder


class EntailmentModel(nn.Module):
    """Classifies a text beside one image: 0 contradiction, 1 neutral, 2 entailment in the published data.

    Args:
        vision: Image encoder.
        text: `Bert` with fusion layers.
        classes: Number of classes.
        head: Classifier: "relu" is that of ALBEF and ViCHA, "mlp" X-VLM's.

    Raises:
        ValueError: An unknown head, or a text encoder that does not fit the image encoder.
    """

    def __init__(
        self, *, vision: ImageEncoder, text: Bert, classes: int = 3, head: ClassHead = "relu"
    ) -> None:
        super().__init__()
        require_fit(vision, text)
        self.vision = vision
        self.text = text
        self.cls_head = class_head(head, text.width, classes)

    def forward(self, images: Images, ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Class logits [B, C]; text b is judged by image b."""
        embeds, mask = self.vision.encode(images)
        return self.classify(embeds, ids_BT, attention_mask_BT, mask)

    def classify(
        self,
        embeds_BLD: Tensor,
        ids_BT: Tensor,
        attention_mask_BT: Tensor,
        image_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """As `forward`, for images already encoded; `image_mask` is 0 or False for image tokens that nothing
        attends to."""
        states = self.text.encode(ids_BT, attention_mask_BT, skip_padding=True)
        (state,) = self.text.fuse_and_read(
            states,
            attention_mask_BT,
            embeds_BLD,
            (ids_BT.new_zeros(len(ids_BT), 1),),
            image_mask_MS=image_mask_BL,
        )
        return self.cls_head(state.squeeze(1))
