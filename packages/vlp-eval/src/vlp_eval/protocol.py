"""What a model must offer to be evaluated. Nothing is inherited: any object with these methods will do.

Features are NamedTuples of tensors whose first axis counts the pictures or texts, so that an evaluation can cut, gather and select
them without knowing the model.

Letters: B pictures or texts, N image tokens, T text tokens, E shared embedding, D / W widths, R pairs.
"""

from typing import Protocol

from torch import Tensor


class ImageFeatures(Protocol):
    """NamedTuple of tensors [B, ...]; these two fields at least."""

    @property
    def embeds(self) -> Tensor:
        """[B,N,D] what the fusion encoder attends to."""
        ...

    @property
    def projection(self) -> Tensor:
        """[B,E] of length 1: the score of a picture and a text is the inner product."""
        ...


class TextFeatures(Protocol):
    """NamedTuple of tensors [B, ...]; these three fields at least."""

    @property
    def embeds(self) -> Tensor:
        """[B,T,W]; what stands at masked positions has no effect on any score."""
        ...

    @property
    def attention_mask(self) -> Tensor:
        """[B,T], 0 where a text is padded."""
        ...

    @property
    def projection(self) -> Tensor:
        """[B,E] of length 1."""
        ...


class DualEncoder(Protocol):
    """Enough for retrieval by similarity alone."""

    def encode_image(self, image: Tensor, /) -> ImageFeatures:
        """Features of pictures [B,3,H,W]."""
        ...

    def encode_text(self, ids: Tensor, attention_mask: Tensor, /) -> TextFeatures:
        """Features of token ids [B,T] (int64) with mask [B,T]; must not depend on how far a text is padded."""
        ...


class RetrievalModel(DualEncoder, Protocol):
    """A dual encoder with a fusion encoder on top, which looks at picture and text together."""

    def match(
        self, image: ImageFeatures, text: TextFeatures, image_index: Tensor, text_index: Tensor, /
    ) -> Tensor:
        """Score of R pairs [R], higher is better: pair r is picture image_index[r] and text text_index[r].

        X-VLM: the raw logit of "match". Work that depends on the picture alone is best done once per picture of `image`.
        """
        ...
