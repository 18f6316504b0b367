"""DeiT / ViT as vision encoder of X-VLM, ALBEF and ViCHA.

Differs from a textbook ViT: no dropout; the final norm is applied to all tokens.
Besides whole images (`forward`) it encodes

    regions         the last `local_depth` blocks run once per text and attend to the region only (X-VLM)
    with others     tokens that stand behind the patches in all blocks, such as visual concepts (ViCHA); see
                    `vlp_core.concepts`
    with summaries  also the class token at some depths (hierarchical alignment of ViCHA)
    what is kept    a part of the patches, for masked image modelling (MAE, ViCHA)

Source: DeiT, arXiv 2012.12877; X-VLM, arXiv 2111.08276, models/vit.py; ViCHA, arXiv 2208.13628,
models/vit.py.
Shapes: B texts, N images, R image side, G patches per side, L = G*G, K other tokens, T = 1+L(+K) tokens, D
    width, S summaries.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from vlp_core.vision.encoder import ImageEncoder, Summarised
from vlp_core.vision.layers import (
    Block,
    Mlps,
    PatchEmbedding,
    VisionRegions,
    check_image,
    check_mlps,
    check_regions,
    drop_path_rates,
    outside_bias,
    run_region_blocks,
)
from vlp_core.vision.positions import resize_position_table


class VisionTransformer(ImageEncoder):
    """ViT with a class token and learned positions.

    Args:
        image_size: Side of the images in pixels; exactly this size is accepted. Pixels beyond the last whole
            patch have no effect (380 pixels are 23 patches of 16).
        patch: Side of a patch in pixels.
        width: Channels.
        depth: Number of blocks.
        heads: Attention heads.
        local_depth: Number of last blocks that attend to the region only, in region mode.
        mlp_ratio: Width inside the feed-forward over `width`.
        initializer_range: Standard deviation of the initial weights; the published 0.02 belongs to width 768.
        position_range: The same for the position table; None: as `initializer_range`. Patches start with a
            deviation of about 0.9, beside which smaller positions are hardly seen.
        drop_path: Stochastic depth of the last block in training, rising linearly from 0 in the first.
        mlps: For some blocks, by number, what makes the module in place of the feed-forward,
            [..., D] -> [..., D]; it keeps its own initial weights.

    LayerNorm eps is 1e-6. Attributes: those of `ImageEncoder`.

    Raises:
        ValueError: Sizes that do not fit together, or a block in `mlps` that is not there.
    """

    keeps_patches = True
    takes_others = True

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
        initializer_range: float = 0.02,
        position_range: float | None = None,
        drop_path: float = 0.0,
        mlps: Mlps | None = None,
    ) -> None:
        super().__init__()
        if image_size < patch:
            raise ValueError(f"image_size={image_size} has no room for a patch={patch}")
        if not 0 <= local_depth <= depth:
            raise ValueError(f"local_depth={local_depth} must lie between 0 and depth={depth}")
        self.image_size, self.patch_size, self.width, self.local_depth = image_size, patch, width, local_depth
        self.tokens = 1 + (image_size // patch) ** 2
        self.depth = depth
        self.class_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(self.tokens, width))
        self.patch = PatchEmbedding(patch=patch, width=width, bias=True)
        mlps = {} if mlps is None else mlps
        check_mlps(mlps, depth)
        self.blocks = nn.ModuleList(
            Block(
                width=width,
                heads=heads,
                hidden=int(mlp_ratio * width),
                activation="gelu",
                eps=1e-6,
                mlp=mlps.get(number),
                drop_path=rate,
            )
            for number, rate in enumerate(drop_path_rates(drop_path, depth))
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        initialise(
            self,
            initializer_range,
            initializer_range if position_range is None else position_range,
            leave=[self.blocks[number].mlp for number in mlps],
        )

    def embed(self, image_NCHW: Tensor, others_NKD: Tensor | None = None) -> Tensor:
        """[N, 3, R, R] -> [N, T, D] before the blocks; other tokens come last and get no position."""
        check_image(image_NCHW, self.image_size)
        patches_NLD = self.patch(image_NCHW).flatten(1, 2)
        token_N1D = self.class_token.expand(patches_NLD.shape[0], 1, -1)
        x_NTD = torch.cat([token_N1D, patches_NLD], dim=1) + self.positions
        return x_NTD if others_NKD is None else torch.cat([x_NTD, others_NKD.to(x_NTD.dtype)], dim=1)

    def forward(
        self, image: Tensor, others: Tensor | None = None, *, visible: Tensor | None = None
    ) -> Tensor:
        """[N, 3, R, R] -> [N, T, D]: class token, patches row by row, other tokens.

        `others`: [N, K, D], tokens that all blocks treat like patches. `visible`: [N, T], 0 for tokens that
        no token attends to; None: all are visible.
        """
        return self.norm(self._run(self.embed(image, others), visible, []))

    def forward_with_summaries(
        self, image: Tensor, others: Tensor | None = None, *, count: int, visible: Tensor | None = None
    ) -> Summarised:
        """As `forward`, with the class token after each of the `count` blocks before the last one.

        Raises ValueError when there are not so many.
        """
        if not 0 < count < len(self.blocks):
            raise ValueError(
                f"{count} summaries were asked for; {len(self.blocks)} blocks have 1..{len(self.blocks) - 1}"
            )
        tokens: list[Tensor] = []
        x_NTD = self._run(self.embed(image, others), visible, tokens)
        return Summarised(self.norm(x_NTD), self.norm(torch.stack(tokens[-count - 1 : -1])))

    def forward_kept(self, patches_NKP: Tensor, ids_NK: Tensor) -> Tensor:
        """States of a part of the patches, class token first: [N, 1+K, D].

        `patches`: the kept ones as `split_patches` gives them; `ids`: their numbers, row by row. As in the
        reference the class token has no position here.
        """
        kept_NKD = self.patch.project(patches_NKP) + F.embedding(ids_NK, self.positions[1:])
        token_N1D = self.class_token.expand(kept_NKD.shape[0], 1, -1)
        return self.norm(self._run(torch.cat([token_N1D, kept_NKD], dim=1), None, []))

    def _run(self, x_NTD: Tensor, visible_NT: Tensor | None, tokens: list[Tensor]) -> Tensor:
        """All blocks; `tokens` receives token 0 after each."""
        bias = None if visible_NT is None else outside_bias(visible_NT, x_NTD.dtype)
        for block in self.blocks:
            x_NTD = block(x_NTD, bias)
            tokens.append(x_NTD[:, 0])
        return x_NTD

    def forward_regions(
        self,
        image: Tensor,
        image_index: Tensor,
        image_attention_mask: Tensor,
        others: Tensor | None = None,
    ) -> VisionRegions:
        """Regions of images. `image_index`: [B], the image of each text; `image_attention_mask`: [B, 1+L], 1
        = patch of the region.

        Column 0 of the mask (the class token) is 1. `others`: [N, K, D] as in `forward`, visible to every
        region of their image.
        """
        check_regions(image, image_index, image_attention_mask, self.tokens)
        if others is not None:
            image_attention_mask = F.pad(image_attention_mask, (0, others.shape[1]), value=1)
        found = run_region_blocks(
            self.blocks,
            self.embed(image, others),
            image_index,
            image_attention_mask,
            local_depth=self.local_depth,
        )
        return VisionRegions(self.norm(found.image_embeds), self.norm(found.full_embeds))

    def position_tables(self) -> dict[str, Callable[[Tensor, Size], Tensor]]:
        """Parameters of the grid's size, with the function(tensor, wanted shape) that resizes one of another
        size."""
        return {"positions": resize_to_shape}


def resize_to_shape(table: Tensor, shape: Size) -> Tensor:
    return resize_position_table(table, math.isqrt(shape[0] - 1))


def initialise(
    model: VisionTransformer, std: float, position_std: float, *, leave: Sequence[nn.Module] = ()
) -> None:
    """Linear weights, class token, positions: normal, cut at +-2 (the published 0.02 at 100 deviations);
    biases 0; LayerNorm 1 and 0; patch embedding and the modules of `leave` as they are."""
    untouched = {module for part in leave for module in part.modules()}
    normal = partial(nn.init.trunc_normal_, std=std)
    normal(model.class_token)
    # The published +-2 of 0.02; a larger deviation keeps its shape.
    normal(model.positions, std=position_std, a=-100 * position_std, b=100 * position_std)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in untouched:
            normal(module.weight)
            nn.init.zeros_(module.bias)


deit_base_224 = {"image_size": 224, "patch": 16, "width": 768, "depth": 12, "heads": 12}
deit_base_384 = deit_base_224 | {"image_size": 384}
