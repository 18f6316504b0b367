"""Parts shared by the vision encoders: patch embedding, feed-forward, self-attention, pre-norm block, region
mode.

Shapes: B texts (regions), N images, C channels, R image side, P patch side, G patches per side, L = G*G
patches, D width, H heads, K width per head.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import vlp_ops
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Activation = Literal["gelu", "quick_gelu"]

# X-VLM adds this number to the scores of patches outside a region (models/vit.py, clip_vit.py); finite, so
# that no row is all -inf.
OUTSIDE = -10000.0


class VisionRegions(NamedTuple):
    """Region mode of an encoder: a row per text, and a row per image (not gathered)."""

    image_embeds: Tensor
    """[B, 1+L, D]: features of each text's region."""
    full_embeds: Tensor
    """[N, 1+L, D]: features of the whole images."""


def check_image(image_NCHW: Tensor, image_size: int) -> None:
    if image_NCHW.ndim != 4 or image_NCHW.shape[1:] != (3, image_size, image_size):
        raise ValueError(
            f"images have shape {list(image_NCHW.shape)}, this encoder was made for [N, 3, {image_size}, "
            f"{image_size}]; "
            "resize the images, or make the encoder with another image_size (its position tables are resized "
            "when loading)"
        )


def check_regions(
    image_NCHW: Tensor, image_index_B: Tensor, image_attention_mask_BT: Tensor, tokens: int
) -> None:
    if image_index_B.ndim != 1:
        raise ValueError(
            f"image_index has shape {list(image_index_B.shape)}, expected [B]: the image's number for each "
            "text"
        )
    if image_attention_mask_BT.shape != (len(image_index_B), tokens):
        raise ValueError(
            f"image_attention_mask has shape {list(image_attention_mask_BT.shape)}, expected "
            f"[{len(image_index_B)}, {tokens}]: "
            f"one column for the class token and {tokens - 1} for the patches"
        )


def take_rows(x: Tensor, index_B: Tensor) -> Tensor:
    """x[index] along the first axis; repeated rows are allowed.

    Written as an embedding look-up: several times faster backward than index_select, and deterministic on a
    GPU.
    """
    return F.embedding(index_B, x.flatten(1)).unflatten(1, x.shape[1:])


def split_patches(image_NCHW: Tensor, patch: int) -> Tensor:
    """Patches as rows of numbers, channel by channel: [N, C, R, R] -> [N, G, G, C*P*P]; pixels right of and
    below the last whole patch are left out."""
    n, c, height, width = image_NCHW.shape
    rows, columns = height // patch, width // patch
    whole = image_NCHW[:, :, : rows * patch, : columns * patch]
    x = whole.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
    return x.permute(0, 2, 4, 1, 3, 5).reshape(n, rows, columns, c * patch * patch)


class PatchEmbedding(nn.Module):
    """Linear map of P x P patches: the convolution of stride P of the reference, as one matrix product.

    Init: PyTorch's convolution (uniform, bound 1/sqrt(3*P*P)) for weight and bias.
    """

    def __init__(self, *, patch: int, width: int, bias: bool) -> None:
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(width, 3, patch, patch))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        bound = 1 / math.sqrt(3 * patch * patch)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """[N, 3, R, R] -> [N, G, G, D]; pixels right of and below the last whole patch are left out, as by
        the convolution."""
        return self.project(split_patches(image_NCHW, self.patch))

    def project(self, patches: Tensor) -> Tensor:
        """Split patches, any number of leading axes, to width D."""
        return vlp_ops.linear(patches, self.weight.flatten(1), self.bias)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), OpenAI CLIP's approximation of GELU, in one fused kernel."""
    return F.silu(1.702 * x) * (1 / 1.702)


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class FeedForward(nn.Module):
    """Linear to `hidden`, activation, Linear back.

    `recompute`: the backward pass computes the activation again instead of keeping its output: a seventh less
    memory for a block, a fiftieth more time.
    """

    def __init__(
        self, *, width: int, hidden: int, activation: Activation = "gelu", recompute: bool = False
    ) -> None:
        super().__init__()
        self.up = vlp_ops.Linear(width, hidden)
        self.down = vlp_ops.Linear(hidden, width)
        self.activation = _ACTIVATIONS[activation]
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        active = self.activation(x)
        # A compiler decides by itself what it keeps, and under torch.func a tensor has no place in memory.
        watched = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if not (self.recompute and torch.is_grad_enabled()) or watched:
            return self.down(active)
        with saved_tensors_hooks(*self._without(active.data_ptr(), x)):
            return self.down(active)

    def _without(self, place: int, x: Tensor) -> tuple[Callable[[Tensor], object], Callable[[Any], Tensor]]:
        """Hooks that keep a shape instead of the activation, whose numbers lie at `place`, and make it again
        from `x`."""

        def pack(saved: Tensor) -> object:
            return saved.shape if saved.data_ptr() == place else saved

        def unpack(kept: Any) -> Tensor:
            return self.activation(x.detach()).view(kept) if isinstance(kept, torch.Size) else kept

        return pack, unpack


class SelfAttention(nn.Module):
    """Multi-head self-attention; query, key and value are one projection in this order."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}")
        self.heads = heads
        self.qkv = vlp_ops.Linear(width, 3 * width)
        self.out = vlp_ops.Linear(width, width)

    def forward(self, x_BTD: Tensor, bias_B11T: Tensor | None = None) -> Tensor:
        x_BHTK = vlp_ops.attention(*self._qkv(x_BTD), bias=bias_B11T)
        return self.out(x_BHTK.transpose(1, 2).flatten(2))

    def weighted(
        self, x_BTD: Tensor, bias_B11T: Tensor | None = None, *, watch: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """As `forward`, by explicit weights [B, H, T, T] that go through `watch` (explanations)."""
        q, k, v = self._qkv(x_BTD)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if bias_B11T is not None:
            scores = scores + bias_B11T
        x_BHTK = watch(scores.softmax(-1)) @ v
        return self.out(x_BHTK.transpose(1, 2).flatten(2))

    def _qkv(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, [B, H, T, K] each."""
        # Parted before the heads are moved, so that the three gradients are written where the linear layer
        # reads them.
        parts_BTHK = self.qkv(x_BTD).unflatten(2, (3, self.heads, -1)).unbind(2)
        return tuple(part.transpose(1, 2) for part in parts_BTHK)


def drop_path(x: Tensor, rate: float, *, training: bool) -> Tensor:
    """Stochastic depth (arXiv 1603.09382): a sample's residual branch is zeroed with probability `rate`, the
    others are scaled by 1/(1-rate)."""
    if rate == 0.0 or not training:
        return x
    kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - rate)
    return x * kept.div_(1 - rate)


def drop_path_rates(rate: float, blocks: int) -> list[float]:
    """The rate of each block: it rises linearly from 0 in the first to `rate` in the last.

    Raises:
        ValueError: A rate outside 0..1 (1 excluded).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path={rate} must be at least 0 and less than 1")
    last = blocks - 1
    return [rate * i / last if last else 0.0 for i in range(blocks)]


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed-forward(norm(x)).

    Args:
        width: Channels.
        heads: Attention heads.
        hidden: Width inside the feed-forward.
        activation: Inside the feed-forward.
        eps: Of both LayerNorms.
        mlp: Makes what stands in place of the feed-forward, [..., D] -> [..., D], such as a memory layer;
            `hidden` and `activation` are then without effect. None: `FeedForward`.
        drop_path: Stochastic depth, the rate at which each of the two branches is left out in training.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        hidden: int,
        activation: Activation,
        eps: float,
        mlp: Callable[[], nn.Module] | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(width=width, heads=heads)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = (
            FeedForward(width=width, hidden=hidden, activation=activation, recompute=True)
            if mlp is None
            else mlp()
        )
        self.drop_path = drop_path

    def forward(self, x_BTD: Tensor, bias_B11T: Tensor | None = None) -> Tensor:
        branch = self.attention(self.attention_norm(x_BTD), bias_B11T)
        x_BTD = x_BTD + drop_path(branch, self.drop_path, training=self.training)
        branch = self.mlp(self.mlp_norm(x_BTD))
        return x_BTD + drop_path(branch, self.drop_path, training=self.training)


Mlps = Mapping[int, Callable[[], nn.Module]]
"""Number of a block -> what makes the module in place of its feed-forward."""


def check_mlps(mlps: Mlps, depth: int) -> None:
    if beyond := sorted(set(mlps) - set(range(depth))):
        raise ValueError(f"mlps name blocks {beyond}, which are none of 0..{depth - 1}")


def outside_bias(visible_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores of tokens that are not visible (0 in the mask): [B, T] -> [B, 1, 1,
    T]."""
    return ((1 - visible_BT.to(dtype)) * OUTSIDE)[:, None, None, :]


def run_region_blocks(
    blocks: nn.ModuleList,
    x_NTD: Tensor,
    image_index_B: Tensor,
    image_attention_mask_BT: Tensor,
    *,
    local_depth: int,
) -> VisionRegions:
    """Blocks of a ViT in X-VLM's region mode, before the final norm.

    All but the last `local_depth` blocks see whole images, once per image. Then each text takes a copy of its
    image, of which the last blocks attend to the region only (keys outside get -10000); whole images go on
    unmasked. Every row is computed, also outside.
    Source: X-VLM models/vit.py and clip_vit.py, `local_attn_depth`. The reference runs region copies and
    images as one batch; they do not interact, so two calls give the same numbers and the images need no mask.
    """
    shared = len(blocks) - local_depth
    for block in list(blocks)[:shared]:
        x_NTD = block(x_NTD)
    region_BTD = take_rows(x_NTD, image_index_B)
    bias_B11T = outside_bias(image_attention_mask_BT, x_NTD.dtype)
    for block in list(blocks)[shared:]:
        region_BTD = block(region_BTD, bias_B11T)
        x_NTD = block(x_NTD)
    return VisionRegions(region_BTD, x_NTD)
