"""What a model must offer to be evaluated. Nothing is inherited: any object with these methods will do.

Images come as one value, `vlp_core.images.Images`: pixels with what belongs to them, such as padding and the
words attached to them (`vision.concepts` is the encoder of a model that reads these). Features are
NamedTuples of tensors whose first axis counts the images or texts, so that an evaluation can cut, gather and
select them without knowing the model; their fields may be None.

Letters: B images or texts, N image tokens, T text tokens, E shared embedding, D / W widths, R pairs, C
answers to choose from, L answer tokens, K classes, Q objects, P x P patches.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor
from vlp_core.explain import Matching
from vlp_core.images import Images
from vlp_core.vision.encoder import ImageEncoder

# --------------------------------------------------------------------------------------------------
# images and texts


class ImageFeatures(Protocol):
    """NamedTuple of tensors [B, ...]; these two fields at least, and `attention_mask` [B,N] where a model
    hides some of its tokens."""

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

    def encode_image(self, images: Images, /) -> ImageFeatures:
        """Features of B images."""
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


@runtime_checkable
class PairScorer(Protocol):
    """Scores an image and a text together and has no encoders of its own for each (ViLT, VLC): retrieval
    scores all pairs."""

    def score(self, images: Images, ids: Tensor, attention_mask: Tensor, /) -> Tensor:
        """Scores [R], higher is better, of R images with one text each, [R,T]; must not depend on how far a
        text is padded."""
        ...


# --------------------------------------------------------------------------------------------------
# questions


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

    def ask(self, images: Images, ids: Tensor, attention_mask: Tensor, /) -> Tensor:
        """States [B,T,W] of B questions about B images."""
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
    """Answers questions by classification over the answers that it was trained with (ViLT, VLC)."""

    @property
    def answers(self) -> Sequence[str]:
        """The C answers, in order of the logits."""
        ...

    def classify_answers(self, images: Images, ids: Tensor, attention_mask: Tensor, /) -> Tensor:
        """Logits [B,C] of B questions about B images."""
        ...


# --------------------------------------------------------------------------------------------------
# statements


class PairClassifier(Protocol):
    """Classifies a text beside two images."""

    def __call__(
        self, groups: Sequence[Images], first: Tensor, second: Tensor, ids: Tensor, attention_mask: Tensor, /
    ) -> Tensor:
        """Logits [B,K] of texts with the images first[b] and second[b] of all groups, counted through."""
        ...


class Classifier(Protocol):
    """Classifies a text beside one image."""

    def __call__(self, images: Images, ids: Tensor, attention_mask: Tensor, /) -> Tensor:
        """Logits [B,K]."""
        ...


# --------------------------------------------------------------------------------------------------
# where in an image


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

    def encode_image(self, images: Images, /) -> ImageFeatures:
        """As in `DualEncoder`."""
        ...


# --------------------------------------------------------------------------------------------------
# captions


class Captioner(Protocol):
    """Writes captions."""

    @property
    def vision(self) -> ImageEncoder:
        """Encodes the images."""
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
        image_mask_BL: Tensor | None,
    ) -> Written:
        """Captions by beam search that go on after the prompt [B,P]; lengths count the prompt. The image
        mask is that of `vision.encode`."""
        ...


# --------------------------------------------------------------------------------------------------
# images alone


@runtime_checkable
class ImageClasses(Protocol):
    """Classifies images: ImageNet fine-tuning, a linear probe, or zero-shot classes of a dual encoder."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the K classes, in order of the logits."""
        ...

    def classify_images(self, images: Images, /) -> Tensor:
        """Logits [B,K]."""
        ...


class Objects(Protocol):
    """Objects found in images, Q in each."""

    @property
    def scores(self) -> Tensor:
        """[B,Q] in 0..1, higher is surer."""
        ...

    @property
    def classes(self) -> Tensor:
        """[B,Q] int64, numbers of classes."""
        ...

    @property
    def boxes(self) -> Tensor | None:
        """[B,Q,4] (cx, cy, w, h) in 0..1 of the image without its padding; None: only masks are found."""
        ...

    @property
    def masks(self) -> Tensor | None:
        """[B,Q,h,w] logits over the batch with its padding, above 0 inside; None: only boxes are found."""
        ...


@runtime_checkable
class ObjectFinder(Protocol):
    """Finds objects of K classes, by boxes, masks or both (detection and instance segmentation, ViSFT)."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the K classes."""
        ...

    def find_objects(self, images: Images, /) -> Objects:
        """The objects of B images, whose sizes may differ (`images.padding`)."""
        ...


@runtime_checkable
class PixelClasses(Protocol):
    """Gives each pixel one of K classes (semantic segmentation, Memory-CLIP)."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the K classes, in order of the logits."""
        ...

    def classify_pixels(self, images: Images, /) -> Tensor:
        """Logits [B,K,h,w]; an evaluation resizes them to the image."""
        ...


@runtime_checkable
class DenseFeatures(Protocol):
    """Features of the patches of images, for heads that are trained on a frozen encoder (probes, ViSFT)."""

    def encode_patches(self, images: Images, /) -> Tensor:
        """[B,D,P,P] of the last layer, row by row, without class token; P x P differs with the size of the
        images."""
        ...
