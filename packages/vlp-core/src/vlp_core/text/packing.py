"""Leaving padding out of the work on texts.

Texts come padded to one length, often to three times the mean. Linear layers, norms and activations work
token by token, so they can run on the real tokens alone, one after the other in a tensor [S, W]. Only
attention needs the texts as rows, and of those only as many columns as the longest text has:

    padded  [R, T, ...]    pack    ->  packed  [S, ...]
    packed  [S, W]         spread  ->  rows    [R, U, W]      before attention; padding is 0
    rows    [R, U, W]      pack    ->  packed  [S, W]         after attention
    packed  [S, W]         unpack  ->  padded  [R, T, W]      at the end; padding is 0

Every function takes None for "nothing is packed" and then returns what it got, so that one code serves both
layouts. Lists of masked tokens are padded too, and packed by the same functions.

Packing pays on the CPU, and `Packing.of` packs nowhere else: the number of real tokens is a size of all
tensors that follow, so an accelerator would have to finish its work before the host can go on, and
`torch.compile` would meet a new size with every batch. What helps there is to pad to the longest text of the
batch.

Shape letters: R texts, T columns of the padded texts, U columns up to the last real token, S real tokens, W
width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Packing(NamedTuple):
    """Where the real tokens of R padded texts are."""

    mask_RU: Tensor
    """True for real tokens."""
    index_S: Tensor
    """Their places among the R*U."""
    columns: int
    """T."""

    @classmethod
    def of(cls, mask_RT: Tensor | None) -> "Packing | None":
        """The packing of texts whose real tokens have 1 or True in the mask, or None where packing does not
        pay (see the module).

        The mask None stands for texts without padding. Real tokens may lie anywhere in their row; their order
        is kept.
        """
        if mask_RT is None or mask_RT.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        mask = mask_RT.bool()
        if mask.all():
            return None
        columns_in_use = mask.any(0).nonzero()
        used = 1 + int(columns_in_use[-1]) if len(columns_in_use) else 0
        mask = mask[:, :used]
        return cls(mask, mask.flatten().nonzero().squeeze(1), mask_RT.shape[1])


def pack(x: Tensor, packing: Packing | None) -> Tensor:
    """Real tokens only: [R, T, ...] or [R, U, ...] -> [S, ...]."""
    if packing is None:
        return x
    return x[:, : packing.mask_RU.shape[1]].flatten(0, 1).index_select(0, packing.index_S)


def spread(x_SW: Tensor, packing: Packing | None) -> Tensor:
    """Rows, 0 at padding: [S, W] -> [R, U, W]."""
    if packing is None:
        return x_SW
    rows, used = packing.mask_RU.shape
    places = x_SW.new_zeros(rows * used, x_SW.shape[1])
    return places.index_copy_(0, packing.index_S, x_SW).unflatten(0, (rows, used))


def unpack(x_SW: Tensor, packing: Packing | None) -> Tensor:
    """Padded texts, 0 at padding: [S, W] -> [R, T, W]."""
    if packing is None:
        return x_SW
    return F.pad(spread(x_SW, packing), (0, 0, 0, packing.columns - packing.mask_RU.shape[1]))


def first_tokens(x: Tensor, packing: Packing | None) -> Tensor:
    """Token 0 of each text, which must be a real one: [R, T, W] or [S, W] -> [R, W]."""
    if packing is None:
        return x[:, 0]
    lengths = packing.mask_RU.sum(1)
    return x.index_select(0, lengths.cumsum(0) - lengths)
