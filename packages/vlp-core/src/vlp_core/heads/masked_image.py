"""Prediction of removed patches from the states of those that were kept.

Source: MAE, arXiv 2111.06377; ViCHA `models/objectives/mae.py`.

Shape letters: N images, K kept patches, L patches, D width of the encoder, C numbers of a patch.
"""

from typing import Literal

import torch
import vlp_ops
from torch import Tensor, nn

from vlp_core.vision.layers import Block
from vlp_core.vision.positions import sincos_table

By = Literal["decoder", "fusion", "both"]


class MaskedImageDecoder(nn.Module):
    """Puts kept patches and mask tokens in their places and predicts pixels from them.

    Args:
        image_width: D.
        patch: Side of a patch in pixels.
        image_size: Side of the images in pixels.
        width: Width of the decoder. With "both", where one mask token serves both ways, it must be D; with
            "fusion" it has no effect.
        depth, heads: Blocks and attention heads of the decoder; no effect with "fusion".
        by: What looks at the patches in between: "decoder", a small ViT of its own; "fusion", the fusion
            layers of a model, where patches are queries and the text is what they attend to; "both", each by
            itself.
        ratio: Share of the patches that is removed.

    The decoder's positions are fixed sines and cosines, made anew for every grid and not part of the state;
    the fusion layers get none, as in the reference. The mask token starts as zeros and the final norm has
    PyTorch's epsilon (1e-5).

    Raises:
        ValueError: An unknown way, a ratio outside 0..1, an image that is no multiple of the patch, widths
            that do not fit.
    """

    def __init__(
        self,
        *,
        image_width: int,
        patch: int,
        image_size: int,
        width: int = 768,
        depth: int = 2,
        heads: int = 16,
        by: By = "decoder",
        ratio: float = 0.75,
    ) -> None:
        super().__init__()
        if by not in ("decoder", "fusion", "both"):
            raise ValueError(f"by={by!r} is not known; choose decoder, fusion or both")
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio={ratio} must lie in 0..1")
        if image_size % patch:
            raise ValueError(
                f"masked image modelling needs images of whole patches, image_size={image_size} is no "
                f"multiple of patch={patch}"
            )
        if by == "both" and width != image_width:
            raise ValueError(
                f"by=both has one mask token for decoder and fusion layers: width={width} must be the "
                f"image encoder's {image_width}"
            )
        self.by: By = by
        self.ratio = ratio
        self.patch_size = patch
        self.mask_token = nn.Parameter(torch.zeros(image_width if by == "fusion" else width))
        numbers = 3 * patch * patch
        if by != "fusion":
            self.embed = vlp_ops.Linear(image_width, width)
            self.register_buffer("positions", sincos_table(width, image_size // patch), persistent=False)
            self.positions: Tensor
            self.blocks = nn.ModuleList(
                Block(width=width, heads=heads, hidden=4 * width, activation="gelu", eps=1e-6)
                for _ in range(depth)
            )
            self.norm = nn.LayerNorm(width)
            self.project = vlp_ops.Linear(width, numbers)
        if by != "decoder":
            self.project_fused = vlp_ops.Linear(image_width, numbers)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    def place(self, states_NKD: Tensor, ids_restore_NL: Tensor) -> Tensor:
        """All patches in their places, mask tokens where one was removed: [N, 1+K, D], class token first ->
        [N, 1+L, D]."""
        mask_token = self.mask_token.to(states_NKD.dtype)
        patches = vlp_ops.restore_tokens(states_NKD[:, 1:], ids_restore_NL, mask_token)
        return torch.cat([states_NKD[:, :1], patches], dim=1)

    def decode(self, kept_NKD: Tensor, ids_restore_NL: Tensor) -> Tensor:
        """Numbers of all patches [N, L, C], by the decoder, from the encoder's states [N, 1+K, D]."""
        x = self.place(self.embed(kept_NKD), ids_restore_NL) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.project(self.norm(x)[:, 1:])
