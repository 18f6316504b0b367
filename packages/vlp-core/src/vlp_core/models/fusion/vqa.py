"""Questions about images, answered by a decoder that attends to the fused question.

Source: arXiv 2107.07651 section 4; X-VLM `models/model_vqa.py`.

Shape letters: B questions, T text tokens, W width, A answers, C candidates, L candidate tokens, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_core.heads import language_head
from vlp_core.images import Images
from vlp_core.models.fusion.encoders import require_fit
from vlp_core.text import decoding, generation
from vlp_core.text.bert import Bert
from vlp_core.text.generation import Generated
from vlp_core.vision.encoder import ImageEncoder


class RankedAnswers(NamedTuple):
    """The k best candidates of each question, best first: `indices` [B, k]; `scores` [B, k], which sum to
    1."""

    indices: Tensor
    scores: Tensor


class VqaModel(nn.Module):
    """Answers questions, by ranking candidates or by writing.

    Args:
        vision: Image encoder.
        text: `Bert` with fusion layers; encodes the question with the image.
        decoder: `Bert` with `fusion_layer=0` and the text width as image width; has embeddings of its own.

    Raises:
        ValueError: Encoders whose widths do not fit.
    """

    def __init__(self, *, vision: ImageEncoder, text: Bert, decoder: Bert) -> None:
        super().__init__()
        require_fit(vision, text)
        require_fit(text, decoder)
        self.vision = vision
        self.text = text
        self.decoder = decoder
        self.lm_head = language_head(decoder)

    def ask(self, images: Images, ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """States of B questions, [B, T, W], question b about image b."""
        embeds, mask = self.vision.encode(images)
        return self.text(ids_BT, attention_mask_BT, embeds, image_mask_MS=mask)

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
        images: Images,
        question_ids_BT: Tensor,
        question_mask_BT: Tensor,
        answer_ids_AT: Tensor,
        answer_mask_AT: Tensor,
        question_index_A: Tensor,
    ) -> Tensor:
        """Next-token logits [A, T, V]: `ask`, then `answer`."""
        question = self.ask(images, question_ids_BT, question_mask_BT)
        return self.answer(question, question_mask_BT, answer_ids_AT, answer_mask_AT, question_index_A)

    @torch.no_grad()
    def rank_answers(
        self,
        question_states_BTW: Tensor,
        question_mask_BT: Tensor,
        candidate_ids_CL: Tensor,
        candidate_mask_CL: Tensor,
        k: int,
        *,
        pairs: int = 1024,
    ) -> RankedAnswers:
        """The best of C given answers for each question.

        The k candidates whose first word is most probable are scored: log p(first token) + sum of log p over
        all their tokens. The first token counts twice, as in the reference. The softmax of these k scores is
        returned.

        Keys and values of a question are computed once, however many candidates look at it, and so is the
        start token.

        Args:
            question_states_BTW: From `ask`.
            question_mask_BT: 1 for real tokens.
            candidate_ids_CL: Start token, answer, end token; the start token is the same for all.
            candidate_mask_CL: 1 for real tokens.
            k: Number of candidates to score, at most C.
            pairs: Candidates scored at a time, rounded to whole questions; memory grows with it.

        Raises:
            ValueError: k outside 1..C, candidates without a token after the start token, or with different
                start tokens.
        """
        candidates, length = candidate_ids_CL.shape
        if not 1 <= k <= candidates:
            raise ValueError(f"k={k} must lie between 1 and the number of candidates, {candidates}")
        if length < 2 or not bool(candidate_mask_CL[:, :2].all()):
            raise ValueError("each candidate needs a start token and at least one more token")
        if not bool((candidate_ids_CL[:, 0] == candidate_ids_CL[0, 0]).all()):
            raise ValueError("candidates must begin with the same start token")
        rows = max(1, pairs // k)
        parts = [
            self._rank(states, mask, candidate_ids_CL, candidate_mask_CL, k)
            for states, mask in zip(
                question_states_BTW.split(rows), question_mask_BT.split(rows), strict=True
            )
        ]
        return RankedAnswers(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _rank(self, states: Tensor, mask: Tensor, ids_CL: Tensor, mask_CL: Tensor, k: int) -> RankedAnswers:
        questions, length = len(states), ids_CL.shape[1]
        words = self.decoder.word_embedding.weight
        cache = decoding.start(self.decoder, states, mask)
        begun, cache = decoding.extend(self.decoder, ids_CL[:1, :1].expand(questions, 1), cache)
        first_word = self.lm_head(begun[:, 0], words).float().log_softmax(1)[:, ids_CL[:, 1]]
        scores, chosen = first_word.topk(k, dim=1)
        scores = 2 * scores.flatten()
        if length > 2:
            ids, real = ids_CL[chosen.flatten()], mask_CL[chosen.flatten()].bool()
            after, _ = decoding.extend(self.decoder, ids[:, 1:-1], cache.repeat(k))
            # Most answers are short: logits over the vocabulary only where a token follows.
            row, place = real[:, 2:].nonzero(as_tuple=True)
            logits = self.lm_head(after[row, place], words).float()
            missed = F.cross_entropy(logits, ids[row, place + 2], reduction="none")
            scores = scores.index_add(0, row, -missed)
        scores, order = scores.view(questions, k).softmax(1).sort(dim=1, descending=True, stable=True)
        return RankedAnswers(chosen.gather(1, order), scores)

    @torch.no_grad()
    def generate_answers(
        self,
        question_states_BTW: Tensor,
        question_mask_BT: Tensor,
        *,
        start_id: int,
        end_id: int,
        pad_id: int = 0,
        beams: int = 3,
        max_tokens: int = 10,
        min_tokens: int = 0,
        length_penalty: float = 1.0,
    ) -> Generated:
        """Write an answer to each question; lengths count the start token. See
        `vlp_core.text.generation.beam_search`."""
        prompt = torch.full((len(question_states_BTW), 1), start_id, device=question_states_BTW.device)
        return generation.beam_search(
            generation.language_step(self.decoder, self.lm_head),
            decoding.start(self.decoder, question_states_BTW, question_mask_BT),
            prompt,
            beams=beams,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            length_penalty=length_penalty,
            end_id=end_id,
            pad_id=pad_id,
        )
