"""Token by token through a `Bert`: every token and every image is projected to keys and values once.

    cache = start(bert, image_embeds)
    states, cache = extend(bert, prompt_ids, cache)     # all prompt tokens at once
    states, cache = extend(bert, next_ids, cache)       # one token per row from here on

Equal to running the whole text with `causal=True` after each token. Gradients flow through all steps.

Shape letters: M images, R text rows (R = M * n: row r looks at image r // n), T new tokens, S image tokens, D
image width, W width.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from vlp_core.text.bert import Bert, KeyValue, Layer, take_image_mask


@dataclass(frozen=True, kw_only=True)
class Cache:
    """What is kept of the tokens and images so far.

    images: Keys and values [M, S, 2W] of the images for each fusion layer.
    image_mask: [M, 1, 1, S], True where visible, or None.
    texts: Keys and values of the tokens so far for each layer; empty at the start.
    tokens: Number of tokens so far.
    """

    images: tuple[Tensor, ...]
    image_mask: Tensor | None
    texts: tuple[KeyValue, ...] = ()
    tokens: int = 0

    def select(self, rows_R: Tensor) -> "Cache":
        """The cache of other rows: row r continues the text of row `rows[r]`, which must look at the same
        image."""
        texts = tuple(KeyValue(kept.key[rows_R], kept.value[rows_R]) for kept in self.texts)
        return replace(self, texts=texts)

    def repeat(self, times: int) -> "Cache":
        """Each row `times` times, one after the other."""
        texts = tuple(
            KeyValue(kept.key.repeat_interleave(times, 0), kept.value.repeat_interleave(times, 0))
            for kept in self.texts
        )
        return replace(self, texts=texts)


def start(text: Bert, image_MSD: Tensor, image_mask_MS: Tensor | None = None) -> Cache:
    """A cache without any token.

    Args:
        text: An encoder with fusion layers.
        image_MSD: What the fusion layers look at (for answers: the states of the question).
        image_mask_MS: 1 or True for visible image tokens; None when all are visible.

    Raises:
        ValueError: An encoder without fusion layers.
    """
    if text.image_width is None:
        raise ValueError("this text encoder has no fusion layers; make it with fusion_layer and image_width")
    images: list[Tensor] = []
    for layer in text.layers[text.fusion_layer :]:
        own = layer.cross.key_value
        images.append(images[-1] if own is None else own(image_MSD))
    return Cache(images=tuple(images), image_mask=take_image_mask(image_mask_MS, None))


def extend(text: Bert, ids_RT: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """Append T tokens to every row.

    Returns:
        States [R, T, W] of the new tokens after the last layer, and the cache for the next ones.

    Raises:
        ValueError: R is no multiple of the number of images, or the text outgrows the position table.
    """
    images = len(cache.images[0])
    if len(ids_RT) % images:
        raise ValueError(f"{len(ids_RT)} texts cannot be divided evenly over {images} images")
    x = text.embed(ids_RT, start=cache.tokens)
    texts = []
    for number, layer in enumerate(text.layers):
        mixed, kept = layer.attention.extend(x, cache.texts[number] if cache.texts else None)
        texts.append(kept)
        x = layer.attention_norm(x + layer.dropout(mixed))
        if number >= text.fusion_layer:
            x = _look(layer, x, cache.images[number - text.fusion_layer], cache.image_mask)
        x = layer.feed_forward(x)
    return x, replace(cache, texts=tuple(texts), tokens=cache.tokens + ids_RT.shape[1])


def _look(layer: Layer, x_RTW: Tensor, key_value_MSW2: Tensor, mask: Tensor | None) -> Tensor:
    """Cross-attention where all rows of an image are queries to one copy of its keys and values."""
    rows, tokens = x_RTW.shape[:2]
    images = len(key_value_MSW2)
    together = x_RTW.view(images, rows // images * tokens, -1)
    return layer.cross_norm(
        x_RTW + layer.dropout(layer.cross(together, key_value_MSW2, mask).view(rows, tokens, -1))
    )
