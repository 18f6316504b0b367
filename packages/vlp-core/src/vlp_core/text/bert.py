"""BERT and RoBERTa encoders whose upper layers can attend to images.

The layers below `fusion_layer` are plain BERT (post-norm). Every layer from `fusion_layer` on has a
cross-attention between its self-attention and its feed-forward part, so one stack of layers is text encoder
and fusion encoder in turn:

    text          encode(ids)                            layers 0 .. fusion_layer-1
    fusion        fuse(states, image)                    layers fusion_layer ..
    multi-modal   forward(ids, image)                    all layers
    causal        any of these with causal=True          (captions, answers)
    two images    image_index=(first, second)            the fusion layers take turns (NLVR2)

What differs from the textbook form is made for speed and changes no result:

- Query, key and value are one matrix. There is no pooler.
- The images come as one pool of M images and each text row names its image by `image_index`. Keys and values
  are projected once per image of the pool, however many rows (positive, negative, masked, box query) look at
  it.
- `fuse_and_read` computes the last layer only at the positions that are read ([CLS], or the masked tokens).
- Padding is left out where nobody reads its states (`vlp_core.text.packing`): `fuse_and_read` always, the
  others with `skip_padding`.
- Masks are boolean. The reference adds -10000 (self) or -1e9 (cross), which is the same unless a row is
  masked completely; token 0 of every text and of every image must therefore be visible.

Source: BERT, arXiv 1810.04805; RoBERTa, arXiv 1907.11692; X-VLM, arXiv 2111.08276 section 3.1,
`models/xbert.py`, `models/xroberta.py`.

Shape letters: R text rows, T text tokens, W width, H heads, K width per head, M images of the pool, S image
tokens, D image width, P positions read. `x` without letters holds states [R, T, W] or packed ones, [S, W] for
the S tokens that are not padding.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import vlp_ops
from torch import Tensor, nn

from vlp_core.text.packing import Packing, first_tokens, pack, spread, unpack
from vlp_core.vision.layers import take_rows


def split_heads(x_RTW: Tensor, heads: int) -> Tensor:
    """[R, T, H*K] -> [R, H, T, K]."""
    return x_RTW.unflatten(-1, (heads, -1)).transpose(1, 2)


class KeyValue(NamedTuple):
    """Keys and values of the tokens of a text so far, [R, H, T, K] each."""

    key: Tensor
    value: Tensor


class SelfAttention(nn.Module):
    """Multi-head attention of a text over itself; `query_RPW` limits the queries, never the keys."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query_key_value = vlp_ops.Linear(width, 3 * width)
        self.out = vlp_ops.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None, query_RPW: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        projection = self.query_key_value
        width = x.shape[-1]
        if query_RPW is None:
            query, key, value = spread(projection(x), packing).chunk(3, dim=-1)
        else:
            query = vlp_ops.linear(query_RPW, projection.weight[:width], projection.bias[:width])
            key_value = vlp_ops.linear(x, projection.weight[width:], projection.bias[width:])
            key, value = spread(key_value, packing).chunk(2, dim=-1)
        mixed = vlp_ops.attention(
            *(split_heads(part, self.heads) for part in (query, key, value)),
            mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        return self.out(pack(mixed, packing) if query_RPW is None else mixed)

    def extend(self, x_RTW: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """Causal attention of T new tokens over `past` and themselves; also the keys and values of all tokens
        so far."""
        query, key, value = (
            split_heads(part, self.heads) for part in self.query_key_value(x_RTW).chunk(3, dim=-1)
        )
        if past is not None:
            key, value = torch.cat([past.key, key], dim=2), torch.cat([past.value, value], dim=2)
        new, all_tokens = query.shape[2], key.shape[2]
        mask = None
        if new > 1:
            mask = torch.ones(new, all_tokens, dtype=torch.bool, device=x_RTW.device).tril(all_tokens - new)
            mask = mask[None, None]
        mixed = vlp_ops.attention(
            query, key, value, mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(mixed.transpose(1, 2).flatten(2)), KeyValue(key, value)


class CrossAttention(nn.Module):
    """Multi-head attention of a text over its image, whose keys and values are already projected.

    `key_value` is None in a layer that shares the projection of an earlier one (see `Bert`).
    """

    def __init__(self, *, width: int, heads: int, image_width: int, dropout: float, shares: bool) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = vlp_ops.Linear(width, width)
        self.key_value = None if shares else vlp_ops.Linear(image_width, 2 * width)
        self.out = vlp_ops.Linear(width, width)

    def forward(
        self, x: Tensor, key_value_RSW2: Tensor, mask: Tensor | None, packing: Packing | None = None
    ) -> Tensor:
        query = spread(self.query(x), packing)
        key, value = key_value_RSW2.chunk(2, dim=-1)
        mixed = vlp_ops.attention(
            *(split_heads(part, self.heads) for part in (query, key, value)),
            mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(pack(mixed.transpose(1, 2).flatten(2), packing))

    def weighted(
        self,
        x_RTW: Tensor,
        key_value_RSW2: Tensor,
        mask: Tensor | None,
        watch: Callable[[Tensor], Tensor] = lambda weights: weights,
    ) -> Tensor:
        """As `forward` without dropout, by explicit weights [R, H, T, S] that go through `watch`
        (explanations)."""
        key, value = key_value_RSW2.chunk(2, dim=-1)
        query, key, value = (split_heads(part, self.heads) for part in (self.query(x_RTW), key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        mixed = watch(scores.softmax(-1)) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Post-norm layer: self-attention, cross-attention when `image_width` is given, feed-forward."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        hidden: int,
        image_width: int | None,
        shares_key_value: bool,
        dropout: float,
        attention_dropout: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(width=width, heads=heads, dropout=attention_dropout)
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        if image_width is not None:
            self.cross = CrossAttention(
                width=width,
                heads=heads,
                image_width=image_width,
                dropout=attention_dropout,
                shares=shares_key_value,
            )
            self.cross_norm = nn.LayerNorm(width, eps=norm_eps)
        self.expand = vlp_ops.Linear(width, hidden)
        self.contract = vlp_ops.Linear(hidden, width)
        self.output_norm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        key_value_RSW2: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        query_RPW: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """States of the layer, in the layout of `x`, or [R, P, W] of the tokens with the states `query`
        alone.

        `packing` says how `x` is packed; `query` never is.
        """
        attended = self.attention(x, mask, query_RPW, packing)
        if query_RPW is not None:
            x, packing = query_RPW, None
        x = self.attention_norm(x + self.dropout(attended))
        if key_value_RSW2 is not None:
            x = self.cross_norm(x + self.dropout(self.cross(x, key_value_RSW2, image_mask, packing)))
        return self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The last part of the layer."""
        return self.output_norm(x + self.dropout(self.contract(F.gelu(self.expand(x)))))


def take_positions(x_RTW: Tensor, positions_RP: Tensor) -> Tensor:
    """States at the given token positions: [R, T, W], [R, P] -> [R, P, W]."""
    return vlp_ops.take_tokens(x_RTW, positions_RP)


class Bert(nn.Module):
    """BERT or RoBERTa with optional fusion layers; see the module for the modes.

    Args:
        kind: "bert": token n stands at position n. "roberta": positions count the tokens that are not
            padding, starting at `pad_id + 1`; padding stands at `pad_id`, whose rows of the word and position
            tables start as zeros and get no gradient.
        vocabulary: Number of tokens.
        width: Width of the states.
        layers: Number of layers, fusion layers included.
        heads: Attention heads.
        hidden: Width inside the feed-forward part.
        positions: Rows of the position table (512 for BERT, 514 for RoBERTa).
        token_types: Rows of the token type table; only type 0 is used.
        pad_id: Padding token; its word embedding starts as zeros and gets no gradient from the embedding.
        fusion_layer: First layer with cross-attention; None for a text-only encoder, 0 for a decoder.
        image_width: Width of the image states; required with fusion layers.
        layers_per_image_projection: Successive fusion layers that share one key/value projection (2 in NLVR2
            models).
        dropout: Dropout on embeddings and on the output of each part of a layer.
        attention_dropout: Dropout on attention probabilities.
        norm_eps: Epsilon of the layer norms (1e-12 BERT, 1e-5 RoBERTa).
        initializer_range: Standard deviation of the initial weights. The published 0.02 belongs to width 768;
            a model of width 64 with it hardly lets a signal through at first, 0.02 * sqrt(768 / width) keeps
            the gain.

    Raises:
        ValueError: `width` is no multiple of `heads`, or `fusion_layer` and `image_width` do not fit
            together.
    """

    def __init__(
        self,
        *,
        kind: Literal["bert", "roberta"] = "bert",
        vocabulary: int = 30522,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        positions: int = 512,
        token_types: int = 2,
        pad_id: int = 0,
        fusion_layer: int | None = None,
        image_width: int | None = None,
        layers_per_image_projection: int = 1,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        if kind not in ("bert", "roberta"):
            raise ValueError(f"text kind {kind!r} is not known; choose bert or roberta")
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}")
        if (fusion_layer is None) != (image_width is None):
            raise ValueError(
                f"fusion_layer={fusion_layer} and image_width={image_width}: give both for an encoder that "
                "attends to "
                "images, neither for one that does not"
            )
        first_fusion = layers if fusion_layer is None else fusion_layer
        if not 0 <= first_fusion <= layers:
            raise ValueError(f"fusion_layer={fusion_layer} must lie between 0 and layers={layers}")
        if (layers - first_fusion) % layers_per_image_projection:
            raise ValueError(
                f"{layers - first_fusion} fusion layers cannot share key/value projections in groups of "
                f"layers_per_image_projection={layers_per_image_projection}"
            )
        self.kind: Literal["bert", "roberta"] = kind
        self.width = width
        self.image_width = image_width
        self.pad_id = pad_id
        self.fusion_layer = first_fusion
        self.layers_per_image_projection = layers_per_image_projection
        # The pad row takes no gradient from look-ups, as in the reference; a tied output projection may still
        # move it.
        self.word_embedding = nn.Embedding(vocabulary, width, padding_idx=pad_id)
        self.position_embedding = nn.Embedding(
            positions, width, padding_idx=pad_id if kind == "roberta" else None
        )
        self.type_embedding = nn.Embedding(token_types, width)
        self.embedding_norm = nn.LayerNorm(width, eps=norm_eps)
        self.embedding_dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(
                width=width,
                heads=heads,
                hidden=hidden,
                image_width=image_width if number >= first_fusion else None,
                shares_key_value=(number - first_fusion) % layers_per_image_projection != 0,
                dropout=dropout,
                attention_dropout=attention_dropout,
                norm_eps=norm_eps,
            )
            for number in range(layers)
        )
        self.initializer_range = initializer_range
        initialise(self, initializer_range)

    def embed(self, ids_RT: Tensor, *, start: int = 0, packing: Packing | None = None) -> Tensor:
        """Sum of word, position and type 0 embeddings, normalised: [R, T] -> [R, T, W], or [S, W] with a
        packing.

        `start`: number of tokens that stand before these, none of them padding.
        """
        first = start + (self.pad_id + 1 if self.kind == "roberta" else 0)
        if first + ids_RT.shape[1] > self.position_embedding.num_embeddings:
            raise ValueError(
                f"texts of {ids_RT.shape[1]} tokens do not fit the position table of "
                f"{self.position_embedding.num_embeddings} rows, whose first position is {first}; lower "
                "max_tokens"
            )
        if self.kind == "roberta":
            real = ids_RT.ne(self.pad_id)
            positions = (start + real.cumsum(1)) * real + self.pad_id
        else:
            positions = torch.arange(start, start + ids_RT.shape[1], device=ids_RT.device)
        if packing is not None:
            positions = pack(positions.expand_as(ids_RT), packing)
        words = self.word_embedding(pack(ids_RT, packing))
        x = words + self.position_embedding(positions) + self.type_embedding.weight[0]
        return self.embedding_dropout(self.embedding_norm(x))

    def encode(
        self,
        ids_RT: Tensor,
        mask_RT: Tensor | None,
        *,
        causal: bool = False,
        skip_padding: bool = False,
    ) -> Tensor:
        """Text states after the layers below `fusion_layer`.

        Args:
            ids_RT: Token ids.
            mask_RT: 1 or True for real tokens (the first one always); None when no row is padded.
            causal: Every token sees only itself and earlier ones.
            skip_padding: Nobody reads the states at padding: they are 0 where leaving them out saves time,
                elsewhere as without this.

        Returns:
            States [R, T, W].
        """
        return self._encode(ids_RT, mask_RT, causal, skip_padding, [])

    def encode_with_summaries(
        self, ids_RT: Tensor, mask_RT: Tensor | None, *, count: int, rows: int, skip_padding: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `encode`, with token 0 of the first `rows` texts after each of the `count` layers before the
        last text layer, lowest first.

        What stands below the first layer, the embedding, counts as a layer here: 6 text layers have 1..6.

        Returns:
            States [R, T, W] and summaries [count, rows, W].

        Raises:
            ValueError: There are not so many.
        """
        if not 0 < count <= self.fusion_layer:
            raise ValueError(
                f"{count} summaries were asked for; {self.fusion_layer} text layers have "
                f"1..{self.fusion_layer}"
            )
        tokens: list[Tensor] = []
        states = self._encode(ids_RT, mask_RT, False, skip_padding, tokens)
        return states, torch.stack([token[:rows] for token in tokens[-count - 1 : -1]])

    def _encode(
        self,
        ids_RT: Tensor,
        mask_RT: Tensor | None,
        causal: bool,
        skip_padding: bool,
        tokens: list[Tensor],
    ) -> Tensor:
        """`encode`; `tokens` receives token 0 of the embeddings and after each layer."""
        packing = Packing.of(mask_RT) if skip_padding else None
        mask = self_mask(
            mask_RT, tokens=ids_RT.shape[1], causal=causal, device=ids_RT.device, packing=packing
        )
        x = self.embed(ids_RT, packing=packing)
        tokens.append(first_tokens(x, packing))
        for layer in self.layers[: self.fusion_layer]:
            x = layer(x, mask, packing=packing)
            tokens.append(first_tokens(x, packing))
        return unpack(x, packing)

    def fuse(
        self,
        x_RTW: Tensor,
        mask_RT: Tensor | None,
        image_MSD: Tensor,
        *,
        image_mask_MS: Tensor | None = None,
        image_index: Tensor | Sequence[Tensor] | None = None,
        causal: bool = False,
        skip_padding: bool = False,
    ) -> Tensor:
        """States after the fusion layers.

        Args:
            x_RTW: States from `encode`.
            mask_RT: As in `encode`.
            image_MSD: Pool of image states.
            image_mask_MS: 1 or True for visible image tokens (the first one always); None when all are
                visible.
            image_index: Image of each row, [R]; several such tensors make the fusion layers take turns; None
                when row r looks at image r.
            causal: As in `encode`.
            skip_padding: As in `encode`.

        Returns:
            States [R, T, W].
        """
        packing = Packing.of(mask_RT) if skip_padding else None
        mask = self_mask(mask_RT, tokens=x_RTW.shape[1], causal=causal, device=x_RTW.device, packing=packing)
        x = pack(x_RTW, packing)
        for layer, key_value, index, image_mask in self._turns(image_MSD, image_mask_MS, image_index):
            x = layer(x, mask, take_images(key_value, index), image_mask, packing=packing)
        return unpack(x, packing)

    def fuse_and_read(
        self,
        x_RTW: Tensor,
        mask_RT: Tensor | None,
        image_MSD: Tensor,
        read: Sequence[Tensor],
        *,
        image_mask_MS: Tensor | None = None,
        image_index: Tensor | Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """States of the last fusion layer at chosen positions only, group by group of consecutive rows.

        Equal to gathering from `fuse`, without computing what is not read. Arguments as in `fuse`, and

        Args:
            read: For each group of rows the positions to read, [rows of the group, P]; the groups cover all
                rows in order. States read at padding mean nothing.

        Returns:
            For each group the states [rows of the group, P, W].
        """
        if sum(positions.shape[0] for positions in read) != x_RTW.shape[0]:
            raise ValueError(
                f"the groups to read have {[positions.shape[0] for positions in read]} rows, the states "
                f"{x_RTW.shape[0]}"
            )
        packing = Packing.of(mask_RT)
        mask = self_mask(mask_RT, tokens=x_RTW.shape[1], causal=False, device=x_RTW.device, packing=packing)
        turns = self._turns(image_MSD, image_mask_MS, image_index)
        x = pack(x_RTW, packing)
        for layer, key_value, index, image_mask in islice(turns, len(self.layers) - self.fusion_layer - 1):
            x = layer(x, mask, take_images(key_value, index), image_mask, packing=packing)
        x_RTW = unpack(x, packing)
        last, key_value, index, image_mask = next(turns)
        groups = []
        start = 0
        for positions in read:
            part = slice(start, start + positions.shape[0])
            start = part.stop
            group, seen = x_RTW[part], None if mask_RT is None else mask_RT[part]
            packing = Packing.of(seen)
            groups.append(
                last(
                    pack(group, packing),
                    self_mask(
                        seen, tokens=group.shape[1], causal=False, device=group.device, packing=packing
                    ),
                    key_value[part] if index is None else take_rows(key_value, index[part]),
                    None if image_mask is None else image_mask[part],
                    query_RPW=take_positions(group, positions),
                    packing=packing,
                )
            )
        return tuple(groups)

    def forward(
        self,
        ids_RT: Tensor,
        mask_RT: Tensor | None,
        image_MSD: Tensor,
        *,
        image_mask_MS: Tensor | None = None,
        image_index: Tensor | Sequence[Tensor] | None = None,
        causal: bool = False,
        skip_padding: bool = False,
    ) -> Tensor:
        """All layers: `encode`, then `fuse`."""
        x = self.encode(ids_RT, mask_RT, causal=causal, skip_padding=skip_padding)
        return self.fuse(
            x,
            mask_RT,
            image_MSD,
            image_mask_MS=image_mask_MS,
            image_index=image_index,
            causal=causal,
            skip_padding=skip_padding,
        )

    def _turns(
        self, image_MSD: Tensor, mask_MS: Tensor | None, image_index: Tensor | Sequence[Tensor] | None
    ) -> Iterator[tuple[nn.Module, Tensor, Tensor | None, Tensor | None]]:
        """For each fusion layer, when its turn comes: the layer, the pool's keys and values, the image of
        each row, their masks."""
        if self.image_width is None:
            raise ValueError(
                "this text encoder has no fusion layers; make it with fusion_layer and image_width"
            )
        indices = (
            [image_index] if image_index is None or isinstance(image_index, Tensor) else list(image_index)
        )
        masks = [take_image_mask(mask_MS, index) for index in indices]
        key_value = image_MSD
        for turn, layer in enumerate(self.layers[self.fusion_layer :]):
            if layer.cross.key_value is not None:
                key_value = layer.cross.key_value(image_MSD)
            yield layer, key_value, indices[turn % len(indices)], masks[turn % len(indices)]


def self_mask(
    mask_RT: Tensor | None,
    *,
    tokens: int,
    causal: bool,
    device: torch.device,
    packing: Packing | None = None,
) -> Tensor | None:
    """Boolean self-attention mask, broadcastable to [R, H, T, T], or with a packing to [R, H, U, U]; None:
    everything is visible."""
    if packing is not None:
        mask_RT, tokens = packing.mask_RU, packing.mask_RU.shape[1]
    mask = None if mask_RT is None else mask_RT.bool()[:, None, None, :]
    if not causal:
        return mask
    lower = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return lower[None, None] if mask is None else mask & lower


def take_images(key_value_MSW2: Tensor, index_R: Tensor | None) -> Tensor:
    """Keys and values for each row."""
    return key_value_MSW2 if index_R is None else take_rows(key_value_MSW2, index_R)


def take_image_mask(mask_MS: Tensor | None, index: Tensor | None) -> Tensor | None:
    """Boolean cross-attention mask of each row, [R, 1, 1, S]."""
    if mask_MS is None:
        return None
    mask = mask_MS.bool() if index is None else mask_MS.bool().index_select(0, index)
    return mask[:, None, None, :]


def initialise(module: nn.Module, deviation: float = 0.02) -> None:
    """Initial values of BERT, for a whole model or one head.

    Linear and embedding weights: normal with this standard deviation. Linear biases: 0. Padding rows: 0.
    Layer norms: 1 and 0.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=deviation)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=deviation)
            if part.padding_idx is not None:
                with torch.no_grad():
                    part.weight[part.padding_idx].zero_()


bert_base = {"kind": "bert", "width": 768, "layers": 12, "heads": 12, "hidden": 3072}
roberta_base = {
    **bert_base,
    "kind": "roberta",
    "vocabulary": 50265,
    "positions": 514,
    "token_types": 1,
    "pad_id": 1,
    "norm_eps": 1e-5,
}
