"""Masking of text for masked language modelling.

Sources: X-VLM specification 4.2 (the generator of the official code, reproduced draw by draw); ViCHA
    specification 3.4.
"""

import random
from collections.abc import Container, Sequence
from typing import NamedTuple

from vlp_data.options import IndependentMasking, MaskingOptions


class Masked(NamedTuple):
    """Masked ids and the positions to predict (in the order they were drawn, without padding)."""

    ids: list[int]
    positions: list[int]


def mask_tokens(
    ids: Sequence[int],
    continues: Sequence[bool],
    options: MaskingOptions,
    *,
    mask_id: int,
    vocabulary: int,
    rng: random.Random,
) -> Masked:
    """Replace a share of `ids`; position 0 ([CLS]) is never touched.

    `continues[i]` says that token i goes on with the word of token i-1. The number to predict is
    min(max_masks, max(1, round(len(ids) * probability))). Of the chosen tokens 80 % become `mask_id`, 10 %
    any id of the vocabulary (special ones included), 10 % stay. The labels are the original ids at the
    returned positions.

    Draws, in this order: one shuffle of positions 1..; per position one uniform if spans are on and one
    integer if it starts a span; one shuffle if too many were collected; per chosen position one or two
    uniforms and possibly one integer. Raises ValueError for fewer than two ids.
    """
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} ids: nothing to mask beside the leading special token")
    wanted = min(options.max_masks, max(1, round(len(ids) * options.probability)))
    spans = options.skipgram_probability > 0 and options.skipgram_size >= 2
    candidates = list(range(1, len(ids)))
    rng.shuffle(candidates)
    # A set on purpose: when nothing is cut off, its iteration order is the order of the later draws in the
    # official code.
    collected: set[int] = set()
    for position in candidates:
        if len(collected) >= wanted:
            break
        if position in collected:
            continue
        start, end = position, position + 1
        if spans and rng.random() < options.skipgram_probability:
            end = position + rng.randint(2, options.skipgram_size)
        if options.whole_words:
            while start >= 0 and continues[start]:
                start -= 1
            while end < len(ids) and continues[end]:
                end += 1
        if start >= 1:  # a piece that continues [CLS] adds nothing, as in the official code
            collected.update(range(start, min(end, len(ids))))
    positions = list(collected)
    if len(positions) > wanted:
        rng.shuffle(positions)
        del positions[wanted:]
    masked = list(ids)
    for position in positions:
        if rng.random() < 0.8:
            masked[position] = mask_id
        elif rng.random() < 0.5:
            masked[position] = rng.randint(0, vocabulary - 1)
    return Masked(masked, positions)


class Draws(NamedTuple):
    """What `mask_independently` goes by, one entry per token of a text."""

    chosen: Sequence[bool]
    """To be predicted, where the token may be."""
    to_mask: Sequence[bool]
    """Becomes the mask token if chosen."""
    to_random: Sequence[bool]
    """Becomes the token of `words` if chosen and not masked."""
    words: Sequence[int]


def draw_independently(
    length: int, options: IndependentMasking, *, vocabulary: int, rng: random.Random
) -> Draws:
    """Draws for `length` tokens: chosen with `probability`; of these 80 % masked, half of the rest any id of
    the vocabulary (special ones included). Four numbers are drawn per token, whatever they decide."""
    rows = [
        (
            rng.random() < options.probability,
            rng.random() < 0.8,
            rng.random() < 0.5,
            rng.randrange(vocabulary),
        )
        for _ in range(length)
    ]
    return Draws(*map(list, zip(*rows, strict=True)))  # type: ignore[arg-type]  # four columns of the rows above


def mask_independently(ids: Sequence[int], draws: Draws, *, mask_id: int, never: Container[int]) -> Masked:
    """Replace what was drawn, but for ids in `never` ([CLS] and padding); positions ascend and may be
    none."""
    masked, positions = list(ids), []
    for position, number in enumerate(ids):
        if not draws.chosen[position] or number in never:
            continue
        positions.append(position)
        if draws.to_mask[position]:
            masked[position] = mask_id
        elif draws.to_random[position]:
            masked[position] = draws.words[position]
    return Masked(masked, positions)
