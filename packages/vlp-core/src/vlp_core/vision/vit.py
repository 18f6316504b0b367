"""DeiT / ViT as X-VLM's vision encoder, with local attention of the last blocks in region mode.

Differs from a textbook ViT: no dropout and no stochastic depth; the final norm is applied to all tokens; in region mode the last
`local_depth` blocks run once per text and attend to the region only.

Source: DeiT, arXiv 2012.12877; X-VLM, arXiv 2111.08276, models/vit.py.
Shapes: B texts, N images, R picture side, G patches per side, L = G*G, T = 1+L tokens, D width.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Size, Tensor, nn

from vlp_core.vision.layers import (
    Block,
    PatchEmbedding,
    VisionRegions,
    check_picture,
    check_regions,
    run_region_blocks,
)
from vlp_core.vision.positions import resize_position_table


class VisionTransformer(nn.Module):
    """ViT with a class token and learned positions.

    `image_size`: side of the pictures; exactly this size is accepted. `patch`: side of a patch, in pixels. `width`, `depth`, `heads`:
    channels, blocks, attention heads. `local_depth`: number of last blocks that attend to the region only, in region mode.
    `mlp_ratio`: hidden width of the feed-forward over the width. LayerNorm eps is 1e-6.

    Attributes: `width` (D), `image_size`, `patch_size`, `tokens` (1+L).
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        local_depth: int = 4,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"image_size={image_size} must be a multiple of patch={patch}")
        if not 0 <= local_depth <= depth:
            raise ValueError(f"local_depth={local_depth} must lie between 0 and depth={depth}")
        self.image_size, self.patch_size, self.width, self.local_depth = image_size, patch, width, local_depth
        self.tokens = 1 + (image_size // patch) ** 2
        self.class_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(self.tokens, width))
        self.patch = PatchEmbedding(patch=patch, width=width, bias=True)
        self.blocks = nn.ModuleList(
            Block(width=width, heads=heads, hidden=int(mlp_ratio * width), activation="gelu", eps=1e-6)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        initialise(self)

    def embed(self, image_NCHW: Tensor) -> Tensor:
        """[N, 3, R, R] -> [N, 1+L, D] before the blocks."""
        check_picture(image_NCHW, self.image_size)
        patches_NLD = self.patch(image_NCHW).flatten(1, 2)
        token_N1D = self.class_token.expand(len(patches_NLD), 1, -1)
        return torch.cat([token_N1D, patches_NLD], dim=1) + self.positions

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, R, R] -> [N, 1+L, D]: class token, then patches row by row."""
        x_NTD = self.embed(image)
        for block in self.blocks:
            x_NTD = block(x_NTD)
        return self.norm(x_NTD)

    def forward_regions(
        self, image: Tensor, image_index: Tensor, image_attention_mask: Tensor
    ) -> VisionRegions:
        """Regions of images. `image_index`: [B], the image of each text; `image_attention_mask`: [B, 1+L], 1 = patch of the region.

        Column 0 of the mask (the class token) is 1.
        """
        check_regions(image, image_index, image_attention_mask, self.tokens)
        found = run_region_blocks(
            self.blocks,
            self.embed(image),
            image_index,
            image_attention_mask,
            local_depth=self.local_depth,
        )
        return VisionRegions(self.norm(found.image_embeds), self.norm(found.full_embeds))

    def position_tables(self) -> dict[str, Callable[[Tensor, Size], Tensor]]:
        """Parameters of the grid's size, with the function(tensor, wanted shape) that resizes one of another size."""
        return {"positions": resize_to_shape}


def resize_to_shape(table: Tensor, shape: Size) -> Tensor:
    return resize_position_table(table, math.isqrt(shape[0] - 1))


def initialise(model: VisionTransformer) -> None:
    """Linear weights, class token, positions: normal, std 0.02, cut at +-2; biases 0; LayerNorm 1 and 0; patch embedding as it is."""
    normal = partial(nn.init.trunc_normal_, std=0.02)
    normal(model.class_token)
    normal(model.positions)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            normal(module.weight)
            nn.init.zeros_(module.bias)


deit_base_224 = {"image_size": 224, "patch": 16, "width": 768, "depth": 12, "heads": 12}
deit_base_384 = deit_base_224 | {"image_size": 384}
