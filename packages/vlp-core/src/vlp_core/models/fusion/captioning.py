"""Image captions: the whole text encoder as causal language model, whose upper layers look at the image.

Source: arXiv 2111.08276; X-VLM `models/model_captioning.py`.

Shape letters: B images, R texts, L image tokens (class, patches, concepts), D image width, T text tokens, P
prompt tokens, V vocabulary.
"""

import torch
from torch import Tensor, nn

from vlp_core.heads import language_head
from vlp_core.images import Images
from vlp_core.models.fusion.encoders import require_fit
from vlp_core.text import decoding, generation
from vlp_core.text.bert import Bert
from vlp_core.text.generation import Generated, Sampled
from vlp_core.vision.encoder import ImageEncoder


class CaptionModel(nn.Module):
    """Writes captions.

    Lengths count the prompt. `generate` searches with beams; `greedy` and `sample` give the log-probability
    of every token, with gradient, for self-critical training (run them under `torch.no_grad` where none is
    wanted).

    Args:
        vision: Image encoder.
        text: `Bert` with fusion layers.

    Raises:
        ValueError: Encoders whose widths do not fit.
    """

    def __init__(self, *, vision: ImageEncoder, text: Bert) -> None:
        super().__init__()
        require_fit(vision, text)
        self.vision = vision
        self.text = text
        self.lm_head = language_head(text)

    def forward(
        self,
        images: Images,
        ids_RT: Tensor,
        attention_mask_RT: Tensor,
        image_index_R: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits [R, T, V]; text r describes image r, or `image_index[r]`."""
        embeds, mask = self.vision.encode(images)
        states = self.text(
            ids_RT,
            attention_mask_RT,
            embeds,
            image_mask_MS=mask,
            image_index=image_index_R,
            causal=True,
        )
        return self.lm_head(states, self.text.word_embedding.weight)

    @torch.no_grad()
    def generate(
        self,
        image_embeds_BLD: Tensor,
        prompt_ids_BP: Tensor,
        *,
        beams: int = 3,
        max_tokens: int = 20,
        min_tokens: int = 5,
        length_penalty: float = 1.0,
        end_id: int,
        pad_id: int = 0,
        image_mask_BL: Tensor | None = None,
    ) -> Generated:
        """Captions of encoded images by beam search; see `vlp_core.text.generation.beam_search`.

        Args:
            image_embeds_BLD: The `embeds` of `vision.encode(images)`.
            prompt_ids_BP: Start token and prompt, the same length for all; not padded.
            beams: Open texts per image.
            max_tokens: Longest text.
            min_tokens: Shortest text.
            length_penalty: Exponent of the length by which sums of log-probabilities are divided.
            end_id: Token that ends a caption.
            pad_id: Token after the end.
            image_mask_BL: The `mask` of `vision.encode(images)`: 0 or False for image tokens that nothing
                attends to.
        """
        return generation.beam_search(
            self._step(),
            decoding.start(self.text, image_embeds_BLD, image_mask_BL),
            prompt_ids_BP,
            beams=beams,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            length_penalty=length_penalty,
            end_id=end_id,
            pad_id=pad_id,
        )

    def greedy(
        self,
        image_embeds_BLD: Tensor,
        prompt_ids_BP: Tensor,
        *,
        max_tokens: int = 20,
        min_tokens: int = 0,
        end_id: int,
        pad_id: int = 0,
        image_mask_BL: Tensor | None = None,
    ) -> Sampled:
        """The most probable token at each step; arguments as in `generate`."""
        return generation.greedy(
            self._step(),
            decoding.start(self.text, image_embeds_BLD, image_mask_BL),
            prompt_ids_BP,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            end_id=end_id,
            pad_id=pad_id,
        )

    def sample(
        self,
        image_embeds_BLD: Tensor,
        prompt_ids_BP: Tensor,
        *,
        samples: int = 1,
        temperature: float = 1.0,
        max_tokens: int = 20,
        min_tokens: int = 0,
        end_id: int,
        pad_id: int = 0,
        generator: torch.Generator | None = None,
        image_mask_BL: Tensor | None = None,
    ) -> Sampled:
        """`samples` drawn captions per image, those of one image together: [B * samples, ...]; arguments as
        in `generate`."""
        return generation.sample(
            self._step(),
            decoding.start(self.text, image_embeds_BLD, image_mask_BL),
            prompt_ids_BP,
            samples=samples,
            temperature=temperature,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            end_id=end_id,
            pad_id=pad_id,
            generator=generator,
        )

    def _step(self) -> generation.Step:
        return generation.language_step(self.text, self.lm_head)
