"""Swin transformer as X-VLM's vision encoder: Swin v1 with a pooled token in front of the patches of its last
stage.

Differs from a textbook Swin: the mean of the last stage's tokens (of the region's tokens, in region mode) is
put in front of them; a stage no larger than the window becomes one window without shift. Here, tokens stay in
the order of the windows from block to block and are re-ordered once between blocks, which gives the same
numbers as rolling and cutting the image twice in every block.

Source: Swin, arXiv 2103.14030; X-VLM, arXiv 2111.08276, models/swin_transformer.py.
Shapes: B texts, N images, W windows, T tokens per window, L = W*T tokens, C channels of a stage, D = output
width, H heads, K width per head.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import torch
import vlp_ops
from torch import Size, Tensor, nn

from vlp_core.vision.encoder import ImageEncoder
from vlp_core.vision.layers import (
    FeedForward,
    PatchEmbedding,
    VisionRegions,
    check_image,
    check_regions,
    drop_path,
    drop_path_rates,
    take_rows,
)
from vlp_core.vision.positions import resize_swin_table

PATCH = 4


def shift_mask(resolution: int, window: int, shift: int) -> Tensor:
    """[W, T, T] float32: 0 where two tokens of a shifted window are neighbours in the image, -100 where the
    shift wrapped one round."""
    steps = torch.zeros(resolution, dtype=torch.long, device="cpu")
    steps[resolution - window : resolution - shift] = 1
    steps[resolution - shift :] = 2
    area = windows(3 * steps[:, None] + steps, window)
    return torch.where(area[:, :, None] != area[:, None, :], -100.0, 0.0)


def windows(grid: Tensor, window: int) -> Tensor:
    """[R, R] -> [W, T]: the window x window squares of a grid, row by row."""
    cut = grid.unflatten(1, (-1, window)).unflatten(0, (-1, window))
    return cut.transpose(1, 2).flatten(2).flatten(0, 1)


def token_order(resolution: int, window: int, shift: int) -> Tensor:
    """[L]: the image's token number (row by row) at every place of the window order, after rolling up and
    left by `shift`."""
    grid = torch.arange(resolution * resolution, device="cpu").view(resolution, resolution)
    return windows(grid.roll((-shift, -shift), (0, 1)), window).flatten()


def merge_order(resolution: int, window: int) -> Tensor:
    """[L]: token numbers so that four in a row make one token of the next stage, whose windows have side
    `window`.

    Within the four: (even row, even column), (odd, even), (even, odd), (odd, odd).
    """
    half = token_order(resolution // 2, window, 0)
    corner = 2 * (half // (resolution // 2)) * resolution + 2 * (half % (resolution // 2))
    return (corner[:, None] + torch.tensor([0, resolution, 1, resolution + 1], device="cpu")).flatten()


class _Reorder(torch.autograd.Function):
    """Tokens in another order. The backward pass is a plain gather too, where index_select's would be a
    scattered addition."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_NLC: Tensor, order_L: Tensor, inverse_L: Tensor) -> Tensor:
        return x_NLC.index_select(1, order_L)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, order_L, inverse_L = inputs
        ctx.save_for_backward(order_L, inverse_L)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        order_L, inverse_L = ctx.saved_tensors
        return _Reorder.apply(grad_outputs[0], inverse_L, order_L), None, None


def _placed(buffer: Tensor) -> Tensor:
    """A tensor computed on the CPU, on the device the model is being made on (`with
    torch.device("meta")`)."""
    return buffer.to(torch.get_default_device())


class _Tables(nn.Module):
    """Constants that are no part of the state, as buffers that are made again: a model that was made on the
    meta device and is filled by a state dict has no other source of them."""

    def __init__(self) -> None:
        super().__init__()
        self._constants: dict[str, Tensor] = {}

    def add_table(self, name: str, table: Tensor) -> None:
        self._constants[name] = table
        self.register_buffer(name, _placed(table), persistent=False)

    def table(self, name: str, like: Tensor) -> Tensor:
        """The table where `like` lies."""
        found = getattr(self, name)
        if found.is_meta and not like.is_meta:
            # load_state_dict(assign=True) takes parameters to their place, but no buffer that is not in it.
            found = self._constants[name].to(like.device)
            setattr(self, name, found)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name, constant in self._constants.items():
            moved = getattr(self, name)
            if not moved.is_meta:
                setattr(self, name, constant.to(moved.device, moved.dtype))
        return self


class Reorder(_Tables):
    """Tokens [N, L, C] from one order to another; the identity costs nothing. Holds no parameters."""

    def __init__(self, before_L: Tensor, after_L: Tensor) -> None:
        super().__init__()
        order = before_L.argsort()[after_L]
        self.identity = torch.equal(before_L, after_L)
        self.add_table("order", order)
        self.add_table("inverse", order.argsort())

    def forward(self, x_NLC: Tensor) -> Tensor:
        return x_NLC if self.identity else _Reorder.apply(x_NLC, *self._orders(x_NLC))

    def undo(self, x_NLC: Tensor) -> Tensor:
        return x_NLC if self.identity else _Reorder.apply(x_NLC, *reversed(self._orders(x_NLC)))

    def _orders(self, x_NLC: Tensor) -> tuple[Tensor, Tensor]:
        return self.table("order", x_NLC), self.table("inverse", x_NLC)


class WindowAttention(nn.Module):
    """Attention inside windows, with a learned bias per head and relative position.

    `bias_table`: [(2w-1)^2, H]; the entry of query (y, x) and key (y', x') is at (y-y'+w-1) * (2w-1) +
        (x-x'+w-1).
    """

    def __init__(self, *, width: int, heads: int, window: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"a stage of width {width} cannot have {heads} heads: the width must be a multiple"
            )
        self.heads, self.window = heads, window
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = vlp_ops.Linear(width, 3 * width)
        self.out = vlp_ops.Linear(width, width)

    def bias(self) -> Tensor:
        """[H, T, T]. Views of the table instead of a look-up by index: a deterministic and cheap backward
        pass."""
        w, side = self.window, 2 * self.window - 1
        table = self.bias_table.view(side, side, self.heads).unfold(0, w, 1).unfold(1, w, 1)
        return table.flip(3, 4).permute(2, 0, 1, 3, 4).reshape(self.heads, w * w, w * w)

    def forward(self, x_NWTC: Tensor, mask_WTT: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x_NWTC).unflatten(3, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        bias_WHTT = self.bias()[None] if mask_WTT is None else self.bias() + mask_WTT[:, None]
        return self.out(attend_windows(q, k, v, bias_WHTT).transpose(2, 3).flatten(3))


def attend_windows(q_NWHTK: Tensor, k_NWHTK: Tensor, v_NWHTK: Tensor, bias_WHTT: Tensor) -> Tensor:
    """softmax(q k^t / sqrt(K) + bias) v per window; a first axis of 1 in `bias` stands for all windows."""
    # Under torch.func a tensor does not say whether one further out wants its gradient.
    wanted = bias_WHTT.requires_grad or torch._C._are_functorch_transforms_active()
    if wanted and not q_NWHTK.is_cuda:
        # PyTorch's fused CPU kernel has no gradient for the bias, and its fallback took 60 ms where this took
        # 45 (Swin-B, stage 1).
        scores = (q_NWHTK * q_NWHTK.shape[-1] ** -0.5) @ k_NWHTK.transpose(-1, -2)
        return (scores + bias_WHTT).softmax(-1).to(v_NWHTK.dtype) @ v_NWHTK
    n, w = q_NWHTK.shape[:2]
    if len(bias_WHTT) == 1:
        x = vlp_ops.attention(*(t.flatten(0, 1) for t in (q_NWHTK, k_NWHTK, v_NWHTK)), bias=bias_WHTT)
        return x.unflatten(0, (n, w))
    # The fused kernels want four axes and expand the bias over the first: windows join the heads.
    x = vlp_ops.attention(
        *(t.flatten(1, 2) for t in (q_NWHTK, k_NWHTK, v_NWHTK)), bias=bias_WHTT.flatten(0, 1)[None]
    )
    return x.unflatten(1, (w, -1))


class SwinBlock(nn.Module):
    """x + attention(norm(x)), x + feed-forward(norm(x)), on tokens in window order [N, W, T, C]; works for
    any order of windows."""

    def __init__(self, *, width: int, heads: int, window: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = WindowAttention(width=width, heads=heads, window=window)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width=width, hidden=hidden)
        self.drop_path = drop_path

    def forward(self, x_NWTC: Tensor, mask_WTT: Tensor | None) -> Tensor:
        branch = self.attention(self.attention_norm(x_NWTC), mask_WTT)
        x_NWTC = x_NWTC + drop_path(branch, self.drop_path, training=self.training)
        branch = self.mlp(self.mlp_norm(x_NWTC))
        return x_NWTC + drop_path(branch, self.drop_path, training=self.training)


class PatchMerging(nn.Module):
    """Four neighbours side by side, normalised, mapped to twice the channels: [N, L, C] -> [N, L/4, 2C];
    order of `merge_order`."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.linear = vlp_ops.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x_NLC: Tensor) -> Tensor:
        n, tokens, width = x_NLC.shape
        return self.linear(self.norm(x_NLC.reshape(n, tokens // 4, 4 * width)))


class SwinStage(_Tables):
    """Blocks of one resolution, odd ones with shifted windows, then merging unless it is the last stage.

    Takes tokens in the order of its own windows; returns them in that of the next stage (`after_L`).
    """

    def __init__(
        self,
        *,
        width: int,
        resolution: int,
        window: int,
        heads: int,
        hidden: int,
        drop_paths: Sequence[float],
        after_L: Tensor,
        merge: bool,
    ) -> None:
        super().__init__()
        self.resolution, self.window = resolution, window
        self.shift = window // 2 if window < resolution else 0
        self.blocks = nn.ModuleList(
            SwinBlock(width=width, heads=heads, window=window, hidden=hidden, drop_path=rate)
            for rate in drop_paths
        )
        plain = token_order(resolution, window, 0)
        self.to_shifted = Reorder(plain, token_order(resolution, window, self.shift))
        self.to_next = Reorder(plain, after_L)
        if self.shift:
            self.add_table("mask", shift_mask(resolution, window, self.shift))
        self.merge = PatchMerging(width=width) if merge else None

    def forward(self, x_NLC: Tensor) -> Tensor:
        tokens = self.window * self.window
        for i, block in enumerate(self.blocks):
            if i % 2 and self.shift:
                x_NLC = self.to_shifted(x_NLC)
                x_NLC = block(x_NLC.unflatten(1, (-1, tokens)), self.table("mask", x_NLC)).flatten(1, 2)
                x_NLC = self.to_shifted.undo(x_NLC)
            else:
                x_NLC = block(x_NLC.unflatten(1, (-1, tokens)), None).flatten(1, 2)
        x_NLC = self.to_next(x_NLC)
        return x_NLC if self.merge is None else self.merge(x_NLC)


class SwinTransformer(ImageEncoder):
    """Swin v1 with a pooled token.

    Args:
        image_size: Side of the images in pixels; exactly this size is accepted.
        window: Side of the attention windows, in tokens.
        width: Channels of the first stage; each further stage doubles them.
        depths: Blocks of each stage.
        heads: Attention heads of each stage.
        mlp_ratio: Width inside the feed-forward over the width of its stage.
        drop_path: Stochastic depth of the last block in training, rising linearly from 0 in the first.

    Attributes: those of `ImageEncoder`; `patch_size` is the total stride.

    Raises:
        ValueError: Windows that do not divide a stage, or a stage of odd resolution before another one.
    """

    def __init__(
        self,
        *,
        image_size: int,
        window: int,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        if len(depths) != len(heads):
            raise ValueError(f"depths={list(depths)} and heads={list(heads)} must have one entry per stage")
        stages = len(depths)
        self.image_size, self.window, self.depths = image_size, window, tuple(depths)
        self.patch_size = PATCH * 2 ** (stages - 1)
        if image_size % self.patch_size:
            raise ValueError(
                f"image_size={image_size} must be a multiple of {self.patch_size}, the stride of {stages} "
                "stages"
            )
        resolutions = [image_size // PATCH // 2**i for i in range(stages)]
        sides = [min(window, resolution) for resolution in resolutions]
        for resolution, side in zip(resolutions, sides, strict=True):
            if resolution % side:
                raise ValueError(
                    f"image_size={image_size} gives a stage of {resolution} x {resolution} tokens, which "
                    f"windows of {window} do not tile"
                )
        self.width = width * 2 ** (stages - 1)
        self.tokens = 1 + resolutions[-1] ** 2

        self.patch = PatchEmbedding(patch=PATCH, width=width, bias=True)
        self.patch_norm = nn.LayerNorm(width)
        rows = [torch.arange(r * r, device="cpu") for r in resolutions]
        self.enter = Reorder(rows[0], token_order(resolutions[0], sides[0], 0))
        rates = drop_path_rates(drop_path, sum(depths))
        self.stages = nn.ModuleList(
            SwinStage(
                width=width * 2**i,
                resolution=resolutions[i],
                window=sides[i],
                heads=heads[i],
                hidden=int(mlp_ratio * width * 2**i),
                drop_paths=rates[sum(depths[:i]) : sum(depths[: i + 1])],
                after_L=merge_order(resolutions[i], sides[i + 1]) if i + 1 < stages else rows[i],
                merge=i + 1 < stages,
            )
            for i in range(stages)
        )
        self.norm = nn.LayerNorm(self.width)
        initialise(self)

    def patches(self, image_NCHW: Tensor) -> Tensor:
        """[N, 3, R, R] -> [N, L, D], row by row, normalised."""
        check_image(image_NCHW, self.image_size)
        x_NLC = self.enter(self.patch_norm(self.patch(image_NCHW).flatten(1, 2)))
        for stage in self.stages:
            x_NLC = stage(x_NLC)
        return self.norm(x_NLC)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, R, R] -> [N, 1+L, D]: the mean of the tokens, then the tokens row by row."""
        x_NLD = self.patches(image)
        return torch.cat([x_NLD.mean(1, keepdim=True), x_NLD], dim=1)

    def forward_regions(
        self, image: Tensor, image_index: Tensor, image_attention_mask: Tensor
    ) -> VisionRegions:
        """Regions of images. `image_index`: [B], the image of each text; `image_attention_mask`: [B, 1+L], 1
        = patch of the region.

        The tokens of a region are those of its image; only the pooled token differs: the mean over the
        region.
        """
        check_regions(image, image_index, image_attention_mask, self.tokens)
        x_NLD = self.patches(image)
        full_NTD = torch.cat([x_NLD.mean(1, keepdim=True), x_NLD], dim=1)
        x_BLD = take_rows(x_NLD, image_index)
        weights_BL1 = image_attention_mask[:, 1:, None].to(x_BLD.dtype)
        pooled_B1D = (weights_BL1 * x_BLD).sum(1, keepdim=True) / weights_BL1.sum(1, keepdim=True)
        return VisionRegions(torch.cat([pooled_B1D, x_BLD], dim=1), full_NTD)

    def position_tables(self) -> dict[str, Callable[[Tensor, Size], Tensor]]:
        """Parameters of the windows' size, with the function(tensor, wanted shape) that resizes one of
        another size."""
        return {name: _resize for name, _ in self.named_parameters() if name.endswith(".bias_table")}


def _resize(table: Tensor, shape: Size) -> Tensor:
    return resize_swin_table(table, (math.isqrt(shape[0]) + 1) // 2)


def initialise(model: SwinTransformer) -> None:
    """Linear weights and bias tables: normal, std 0.02, cut at +-2; biases 0; LayerNorm 1 and 0; patch
    embedding as it is."""
    normal = partial(nn.init.trunc_normal_, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            normal(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, WindowAttention):
            normal(module.bias_table)


_base = {"width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}
swin_base_224 = dict(image_size=224, window=7, **_base)
swin_base_384 = dict(image_size=384, window=12, **_base)
swin_base_480 = dict(image_size=480, window=15, **_base)
