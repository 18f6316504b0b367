"""Models of the X-VLM tasks whose layout differs from pre-training: NLVR2, VQA and captioning.

Source: arXiv 2111.08276; `models/model_nlvr.py`, `models/model_nlvr_pretrain.py`, `models/model_vqa.py`, `models/model_captioning.py`.

Shape letters: B pairs, questions or images, A answers, T text tokens, V vocabulary, K classes; others as in `vlp_core.models.xvlm`.
"""

from typing import Literal

from torch import Tensor, nn

from vlp_core.heads import MaskedLanguageHead, mlp_head
from vlp_core.models.xvlm import require_fit
from vlp_core.text.bert import Bert


def language_head(text: Bert) -> MaskedLanguageHead:
    """A head whose output projection is the word embedding of `text`."""
    return MaskedLanguageHead(
        width=text.width, vocabulary=text.word_embedding.num_embeddings, norm_eps=text.embedding_norm.eps
    )


class XvlmNlvr(nn.Module):
    """Two images and a sentence: the fusion layers look at the first and the second image in turn.

    Args:
        vision: Image encoder.
        text: `Bert` with twice the fusion layers and `layers_per_image_projection=2`.
        stage: "domain": three classes (text fits the first image, the second, none) by a linear layer, with a vision projection that
            finds negatives; "fine_tune": two classes (false, true) by a small MLP.
        embed_width: Width of the vision projection of the domain stage.
    """

    def __init__(
        self,
        *,
        vision: nn.Module,
        text: Bert,
        stage: Literal["domain", "fine_tune"] = "fine_tune",
        embed_width: int = 256,
    ) -> None:
        super().__init__()
        if stage not in ("domain", "fine_tune"):
            raise ValueError(f"stage {stage!r} is not known; choose domain or fine_tune")
        require_fit(vision, text)
        self.vision = vision
        self.text = text
        self.stage = stage
        if stage == "domain":
            self.vision_proj = nn.Linear(vision.width, embed_width)
            self.ta_head = nn.Linear(text.width, 3)
        else:
            self.cls_head = mlp_head(text.width, 2)

    def forward(
        self, image_NCHW: Tensor, first_B: Tensor, second_B: Tensor, ids_BT: Tensor, attention_mask_BT: Tensor
    ) -> Tensor:
        """Class logits [B, K] of texts with the images `first[b]` and `second[b]` of the batch of N images."""
        return self.classify(self.vision(image_NCHW), first_B, second_B, ids_BT, attention_mask_BT)

    def classify(
        self, embeds_NLD: Tensor, first_B: Tensor, second_B: Tensor, ids_BT: Tensor, attention_mask_BT: Tensor
    ) -> Tensor:
        """As `forward`, for images already encoded."""
        states = self.text.encode(ids_BT, attention_mask_BT)
        (state,) = self.text.fuse_and_read(
            states,
            attention_mask_BT,
            embeds_NLD,
            (ids_BT.new_zeros(len(ids_BT), 1),),
            image_index=(first_B, second_B),
        )
        head = self.ta_head if self.stage == "domain" else self.cls_head
        return head(state.squeeze(1))


class XvlmVqa(nn.Module):
    """Questions answered by a decoder that attends to the fused question.

    Args:
        vision: Image encoder.
        text: `Bert` with fusion layers; encodes the question with the image.
        decoder: `Bert` with `fusion_layer=0` and the text width as image width; has embeddings of its own.
    """

    def __init__(self, *, vision: nn.Module, text: Bert, decoder: Bert) -> None:
        super().__init__()
        require_fit(vision, text)
        require_fit(text, decoder)
        self.vision = vision
        self.text = text
        self.decoder = decoder
        self.lm_head = language_head(decoder)

    def ask(self, image_BCHW: Tensor, ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """States of B questions, [B, T, W]."""
        return self.text(ids_BT, attention_mask_BT, self.vision(image_BCHW))

    def answer(
        self,
        question_BTW: Tensor,
        question_mask_BT: Tensor,
        answer_ids_AT: Tensor,
        answer_mask_AT: Tensor,
        question_index_A: Tensor,
    ) -> Tensor:
        """Next-token logits [A, T, V] of A answers, each to the question `question_index[a]`."""
        states = self.decoder(
            answer_ids_AT,
            answer_mask_AT,
            question_BTW,
            image_mask_MS=question_mask_BT,
            image_index=question_index_A,
            causal=True,
        )
        return self.lm_head(states, self.decoder.word_embedding.weight)

    def forward(
        self,
        image_BCHW: Tensor,
        question_ids_BT: Tensor,
        question_mask_BT: Tensor,
        answer_ids_AT: Tensor,
        answer_mask_AT: Tensor,
        question_index_A: Tensor,
    ) -> Tensor:
        """Next-token logits [A, T, V]: `ask`, then `answer`."""
        question = self.ask(image_BCHW, question_ids_BT, question_mask_BT)
        return self.answer(question, question_mask_BT, answer_ids_AT, answer_mask_AT, question_index_A)


class XvlmCaption(nn.Module):
    """The whole text encoder as causal language model; its upper layers look at the image.

    Args:
        vision: Image encoder.
        text: `Bert` with fusion layers.
    """

    def __init__(self, *, vision: nn.Module, text: Bert) -> None:
        super().__init__()
        require_fit(vision, text)
        self.vision = vision
        self.text = text
        self.lm_head = language_head(text)

    def forward(
        self,
        image_NCHW: Tensor,
        ids_BT: Tensor,
        attention_mask_BT: Tensor,
        image_index_B: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits [B, T, V]; text b describes image b, or `image_index[b]`."""
        states = self.text(
            ids_BT, attention_mask_BT, self.vision(image_NCHW), image_index=image_index_B, causal=True
        )
        return self.lm_head(states, self.text.word_embedding.weight)
