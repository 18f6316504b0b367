"""CLIP's vision tower as X-VLM's vision encoder, with local attention of the last blocks in region mode.

Differs from a textbook ViT: patch embedding without bias, a LayerNorm before the first block, quick-GELU.
Differs from CLIP: the final norm is applied to all tokens, and there is no projection. In region mode the
last `local_depth` blocks run once per text and attend to the region only.

Source: CLIP, arXiv 2103.00020 (Hugging Face's `CLIPVisionModel`); X-VLM, arXiv 2111.08276,
models/clip_vit.py.
Shapes: B texts, N images, R image side, G patches per side, L = G*G, T = 1+L tokens, D width.
"""

from collections.abc import Callable, Collection

import torch
from torch import Size, Tensor, nn

from vlp_core.vision.encoder import ImageEncoder
from vlp_core.vision.layers import (
    Activation,
    Block,
    Mlps,
    PatchEmbedding,
    VisionRegions,
    check_image,
    check_mlps,
    check_regions,
    drop_path_rates,
    run_region_blocks,
)
from vlp_core.vision.vit import resize_to_shape


class ClipVisionTransformer(ImageEncoder):
    """CLIP's ViT with a class token and learned positions.

    Args:
        image_size: Side of the images in pixels; exactly this size is accepted.
        patch: Side of a patch in pixels.
        width: Channels.
        depth: Number of blocks.
        heads: Attention heads.
        hidden: Width inside the feed-forward.
        activation: Inside the feed-forward; "quick_gelu" in OpenAI's models.
        local_depth: Number of last blocks that attend to the region only, in region mode.
        drop_path: Stochastic depth of the last block in training, rising linearly from 0 in the first.
        mlps: For some blocks, by number, what makes the module in place of the feed-forward,
            [..., D] -> [..., D]; it keeps its own initial weights.

    LayerNorm eps is 1e-5. Attributes: those of `ImageEncoder`.

    Raises:
        ValueError: Sizes that do not fit together, or a block in `mlps` that is not there.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        activation: Activation = "quick_gelu",
        local_depth: int = 4,
        drop_path: float = 0.0,
        mlps: Mlps | None = None,
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
        self.patch = PatchEmbedding(patch=patch, width=width, bias=False)
        self.pre_norm = nn.LayerNorm(width)
        mlps = {} if mlps is None else mlps
        check_mlps(mlps, depth)
        self.blocks = nn.ModuleList(
            Block(
                width=width,
                heads=heads,
                hidden=hidden,
                activation=activation,
                eps=1e-5,
                mlp=mlps.get(number),
                drop_path=rate,
            )
            for number, rate in enumerate(drop_path_rates(drop_path, depth))
        )
        self.norm = nn.LayerNorm(width)
        initialise(self, leave=frozenset(mlps))

    def embed(self, image_NCHW: Tensor) -> Tensor:
        """[N, 3, R, R] -> [N, 1+L, D] before the blocks."""
        check_image(image_NCHW, self.image_size)
        patches_NLD = self.patch(image_NCHW).flatten(1, 2)
        token_N1D = self.class_token.expand(patches_NLD.shape[0], 1, -1)
        return self.pre_norm(torch.cat([token_N1D, patches_NLD], dim=1) + self.positions)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, R, R] -> [N, 1+L, D]: class token, then patches row by row."""
        x_NTD = self.embed(image)
        for block in self.blocks:
            x_NTD = block(x_NTD)
        return self.norm(x_NTD)

    def forward_regions(
        self, image: Tensor, image_index: Tensor, image_attention_mask: Tensor
    ) -> VisionRegions:
        """Regions of images. `image_index`: [B], the image of each text; `image_attention_mask`: [B, 1+L], 1
        = patch of the region.

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
        """Parameters of the grid's size, with the function(tensor, wanted shape) that resizes one of another
        size."""
        return {"positions": resize_to_shape}


def initialise(model: ClipVisionTransformer, *, leave: Collection[int] = ()) -> None:
    """CLIP's rules, for training from scratch (X-VLM always starts from CLIP's weights). All normal; D width,
    n blocks:

    class token 1/sqrt(D); positions and patch embedding 0.02; query, key, value and second feed-forward
    matrix 1/sqrt(2 n D); output of the attention 1/sqrt(D); first feed-forward matrix 1/sqrt(2 D); biases 0;
    LayerNorm 1 and 0. The feed-forwards of the blocks in `leave` stay as they are.
    """
    width, depth = model.width, len(model.blocks)
    nn.init.normal_(model.class_token, std=width**-0.5)
    nn.init.normal_(model.positions, std=0.02)
    nn.init.normal_(model.patch.weight, std=0.02)
    for number, block in enumerate(model.blocks):
        nn.init.normal_(block.attention.qkv.weight, std=(2 * depth * width) ** -0.5)
        nn.init.normal_(block.attention.out.weight, std=width**-0.5)
        nn.init.zeros_(block.attention.qkv.bias)
        nn.init.zeros_(block.attention.out.bias)
        if number in leave:
            continue
        nn.init.normal_(block.mlp.up.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.down.weight, std=(2 * depth * width) ** -0.5)
        nn.init.zeros_(block.mlp.up.bias)
        nn.init.zeros_(block.mlp.down.bias)


clip_vit_base_224 = {"image_size": 224, "patch": 16, "width": 768, "depth": 12, "heads": 12, "hidden": 3072}
clip_vit_base_384 = clip_vit_base_224 | {"image_size": 384}
