"""BERT with fusion layers and AdamW written down plainly, for the yardsticks `plain_xvlm.py` and
`plain_vicha.py`.

Written from the description of the methods, on the official parameter names. Plain means: every attention has
three projections, written-out scores, an added mask and a softmax; the optimizer loops over parameters.

Source: BERT, arXiv 1810.04805. Shape letters: B texts, T tokens, W text width.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


class PlainText:
    """Text layers, fusion layers and language head on a dict of official parameters; dropout is off.

    `encoder` in the methods is the part of a name in front of `embeddings` and `encoder.layer`.
    """

    def __init__(
        self, parameters: dict[str, Tensor], *, text_heads: int, fusion_layer: int, text_eps: float
    ) -> None:
        self.p = parameters
        self.text_heads, self.fusion_layer, self.text_eps = text_heads, fusion_layer, text_eps
        self.text_layers = self.count_layers("text_encoder.bert")

    def count_layers(self, encoder: str) -> int:
        """Layers of a BERT."""
        base = f"{encoder}.encoder.layer."
        return len({name.removeprefix(base).split(".")[0] for name in self.p if name.startswith(base)})

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        weight = self.p[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self.p[f"{name}.bias"], eps)

    def language_head(self, x: Tensor, encoder: str = "text_encoder") -> Tensor:
        head, words = f"{encoder}.cls.predictions", f"{encoder}.bert.embeddings.word_embeddings.weight"
        x = self.norm(
            f"{head}.transform.LayerNorm", F.gelu(self.linear(f"{head}.transform.dense", x)), self.text_eps
        )
        return F.linear(x, self.p[words], self.p[f"{head}.bias"])

    def embed(self, ids: Tensor, encoder: str = "text_encoder.bert") -> Tensor:
        root = f"{encoder}.embeddings"
        x = F.embedding(ids, self.p[f"{root}.word_embeddings.weight"], padding_idx=0)
        x = x + F.embedding(torch.zeros_like(ids), self.p[f"{root}.token_type_embeddings.weight"])
        x = x + F.embedding(torch.arange(ids.shape[1])[None], self.p[f"{root}.position_embeddings.weight"])
        return self.norm(f"{root}.LayerNorm", x, self.text_eps)

    def encode_text(self, ids: Tensor, mask: Tensor, encoder: str = "text_encoder.bert") -> Tensor:
        x = self.embed(ids, encoder)
        for number in range(self.fusion_layer):
            x = self.bert_layer(number, x, mask, None, None, encoder)
        return x

    def fuse(
        self, x: Tensor, mask: Tensor, image: Tensor, image_mask: Tensor, encoder: str = "text_encoder.bert"
    ) -> Tensor:
        for number in range(self.fusion_layer, self.text_layers):
            x = self.bert_layer(number, x, mask, image, image_mask, encoder)
        return x

    def bert_layer(
        self,
        number: int,
        x: Tensor,
        mask: Tensor,
        image: Tensor | None,
        image_mask: Tensor | None,
        encoder: str = "text_encoder.bert",
    ) -> Tensor:
        name = f"{encoder}.encoder.layer.{number}"
        x = self.attention(f"{name}.attention", x, x, (1 - mask.float()) * -10000.0)
        if image is not None:
            x = self.attention(f"{name}.crossattention", x, image, (1 - image_mask.float()) * -1e9)
        y = self.linear(f"{name}.output.dense", F.gelu(self.linear(f"{name}.intermediate.dense", x)))
        return self.norm(f"{name}.output.LayerNorm", x + y, self.text_eps)

    def attention(self, name: str, x: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], self.text_heads, -1).permute(0, 2, 1, 3)

        q = split(self.linear(f"{name}.self.query", x))
        k = split(self.linear(f"{name}.self.key", seen))
        v = split(self.linear(f"{name}.self.value", seen))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask[:, None, None, :]
        mixed = (scores.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(x.shape)
        return self.norm(
            f"{name}.output.LayerNorm", x + self.linear(f"{name}.output.dense", mixed), self.text_eps
        )


class PlainAdamW:
    """The update of AdamW, parameter by parameter; `decayed` names those with weight decay."""

    def __init__(
        self, parameters: Mapping[str, Tensor], *, lr: float, weight_decay: float, eps: float = 1e-8
    ) -> None:
        self.parameters, self.lr, self.weight_decay, self.eps = parameters, lr, weight_decay, eps
        self.state: dict[str, tuple[int, Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            step, mean, square = self.state.get(name) or (
                0,
                torch.zeros_like(parameter),
                torch.zeros_like(parameter),
            )
            mean.mul_(0.9).add_(parameter.grad, alpha=0.1)
            square.mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
            self.state[name] = (step := step + 1, mean, square)
            size = self.lr * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
            parameter.addcdiv_(mean, square.sqrt().add_(self.eps), value=-size)
            parameter.add_(parameter, alpha=-self.lr * self.weight_decay)
