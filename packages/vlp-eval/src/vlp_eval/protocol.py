"""What a model must offer to be evaluated. Nothing is inherited: any object with these methods will do.

Features are NamedTuples of tensors whose first axis counts the images or texts, so that an evaluation can
cut, gather and select them without knowing the model.

A model whose image encoder sees words attached to the images (`vision.concepts` is its encoder of them, as in
`vlp_core.concepts.ConceptVision`) takes them last wherever it takes images: `encode_image(image, concepts)`,
`ask(image, ids, mask, concepts)` and so on, `concepts` a `vlp_core.concepts.Concepts`; for two images a pair
of these. Its `embeds` may be longer than the patches (`vision.tokens` is 1 and the number of these), and its
image features may have an `attention_mask` [B,N] beside them. Fields of features may be None.

Letters: B images or texts, N image tokens, T text tokens, E shared embedding, D / W widths, R pairs, C
answers to choose from, L answer tokens, K classes.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor
from vlp_core.explain import Matching


class ImageFeatures(Protocol):
    """NamedTuple of tensors [B, ...]; these two fields at least."""

    @property
    def embeds(self) -> Tensor:
        """[B,N,D] what the fusion encoder attends to."""
        ...

    @property
    def projection(self) -> Tensor:
        """[B,E] of length 1: the score of an image and a text is the inner product."""
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
        """Features of images [B,3,H,W]."""
        ...

    def encode_text(self, ids: Tensor, attention_mask: Tensor, /) -> TextFeatures:
        """Features of token ids [B,T] (int64) with mask [B,T]; must not depend on how far a text is
        padded."""
        ...


class RetrievalModel(DualEncoder, Protocol):
    """A dual encoder with a fusion encoder on top, which looks at image and text together."""

    def match(
        self, image: ImageFeatures, text: TextFeatures, image_index: Tensor, text_index: Tensor, /
    ) -> Tensor:
        """Score of R pairs [R], higher is better: pair r is image image_index[r] and text text_index[r].

        X-VLM: the raw logit of "match". Work that depends on the image alone is best done once per image of
        `image`.
        """
        ...


class Ranked(Protocol):
    """The k best candidates of each question, best first."""

    @property
    def indices(self) -> Tensor:
        """[B,k] int64, which candidate."""
        ...

    @property
    def scores(self) -> Tensor:
        """[B,k], higher is better."""
        ...


class Written(Protocol):
    """Texts that a model wrote."""

    @property
    def ids(self) -> Tensor:
        """[B,L] int64 with what the model was given to begin with; padding after the end."""
        ...


class QuestionAnswering(Protocol):
    """Answers questions about images, by choosing (`rank_answers`) or by writing (`generate_answers`)."""

    def ask(self, image: Tensor, ids: Tensor, attention_mask: Tensor, /) -> Tensor:
        """States [B,T,W] of B questions about images [B,3,H,W]."""
        ...

    def rank_answers(
        self,
        question: Tensor,
        question_mask: Tensor,
        candidate_ids: Tensor,
        candidate_mask: Tensor,
        k: int,
        /,
        *,
        pairs: int,
    ) -> Ranked:
        """The k best of C candidates [C,L] for each question; `pairs` bounds how many are scored at a
        time."""
        ...

    def generate_answers(
        self,
        question: Tensor,
        question_mask: Tensor,
        /,
        *,
        start_id: int,
        end_id: int,
        pad_id: int,
        beams: int,
        max_tokens: int,
    ) -> Written:
        """An answer to each question, by beam search."""
        ...


@runtime_checkable
class AnswerClasses(Protocol):
    """Answers questions about images by classification over the answers that it was trained with (ViLT, VLC)."""

    @property
    def answers(self) -> Sequence[str]:
        """The C answers, in order of the logits."""
        ...

    def classify_answers(self, image: Tensor, ids: Tensor, attention_mask: Tensor, /) -> Tensor:
        """Logits [B,C] of B questions about images [B,3,H,W]."""
        ...


class PairClassifier(Protocol):
    """Classifies a text beside two images."""

    def __call__(
        self, image: Tensor, first: Tensor, second: Tensor, ids: Tensor, attention_mask: Tensor, /
    ) -> Tensor:
        """Logits [B,K] of texts with the images first[b] and second[b] of a batch [N,3,H,W]."""
        ...


class Classifier(Protocol):
    """Classifies a text beside one image."""

    def __call__(self, image: Tensor, ids: Tensor, attention_mask: Tensor, /) -> Tensor:
        """Logits [B,K]."""
        ...


class Grounder(DualEncoder, Protocol):
    """Says where in an image a text points to."""

    def locate(
        self, image: ImageFeatures, text: TextFeatures, image_index: Tensor, text_index: Tensor, /
    ) -> Tensor:
        """Box (cx, cy, w, h) in 0..1 of the image, for R pairs as in `match`: [R,4]."""
        ...


class HeatMapper(Matching, Protocol):
    """A fusion model with a matching head, whose cross-attention `vlp_core.explain.attention_heat` can
    read."""

    def encode_image(self, image: Tensor, /) -> ImageFeatures:
        """As in `DualEncoder`."""
        ...


class Captioner(Protocol):
    """Writes captions."""

    def vision(self, image: Tensor, /) -> Tensor:
        """States [B,N,D] of images."""
        ...

    def generate(
        self,
        image_embeds: Tensor,
        prompt_ids: Tensor,
        /,
        *,
        beams: int,
        max_tokens: int,
        min_tokens: int,
        length_penalty: float,
        end_id: int,
        pad_id: int,
    ) -> Written:
        """Captions by beam search that go on after the prompt [B,P]; lengths count the prompt."""
        ...
