"""What several models are made of."""

from vlp_core.heads import MaskedLanguageHead
from vlp_core.text.bert import Bert
from vlp_core.vision.encoder import ImageEncoder


def require_fit(vision: ImageEncoder | Bert, text: Bert) -> None:
    """Refuse a text encoder whose cross-attention expects another width than the image encoder gives."""
    if text.image_width != vision.width:
        raise ValueError(
            f"the text encoder's image_width={text.image_width} does not fit the image encoder's width {vision.width}"
        )


def language_head(text: Bert) -> MaskedLanguageHead:
    """A head whose output projection is the word embedding of `text`."""
    return MaskedLanguageHead(
        width=text.width,
        vocabulary=text.word_embedding.num_embeddings,
        norm_eps=text.embedding_norm.eps,
        initializer_range=text.initializer_range,
    )
