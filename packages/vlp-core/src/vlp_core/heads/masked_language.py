"""Prediction of tokens from states of a text encoder."""

import torch
import torch.nn.functional as F
import vlp_ops
from torch import Tensor, nn

from vlp_core.text.bert import Bert, initialise


class MaskedLanguageHead(nn.Module):
    """Dense, GELU, layer norm, then the word embeddings as output projection, plus a bias per token.

    The word embeddings are handed in at each call, so the tied matrix exists, is saved and is optimised once.
    Source: BERT, arXiv 1810.04805.
    """

    def __init__(
        self, *, width: int, vocabulary: int, norm_eps: float = 1e-12, initializer_range: float = 0.02
    ) -> None:
        super().__init__()
        self.dense = vlp_ops.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        initialise(self, initializer_range)

    def forward(self, x: Tensor, word_embedding_VW: Tensor) -> Tensor:
        """Logits [..., V] of states [..., W]."""
        return vlp_ops.linear(self.norm(F.gelu(self.dense(x))), word_embedding_VW, self.bias)


def language_head(text: Bert) -> MaskedLanguageHead:
    """A head whose output projection is the word embedding of `text`."""
    return MaskedLanguageHead(
        width=text.width,
        vocabulary=text.word_embedding.num_embeddings,
        norm_eps=text.embedding_norm.eps,
        initializer_range=text.initializer_range,
    )
