"""Any image classification backbone of timm as an image encoder; timm is imported when one is made.

Features are what timm calls unpooled: `forward_features`, then `forward_head(pre_logits=True)` of a model
without pooling and classifier. Token 0 is the class token where the architecture has one, else the mean of
the patches; registers and other tokens of timm's are used inside and left out of the result.

Modes, by architecture:

    plain ViT (timm's `VisionTransformer`)
        all modes of our `VisionTransformer`; without a class token no summaries
    a map of features without class token (ResNet, ConvNeXt, Swin, ...)
        regions as our `SwinTransformer` has them: token 0 is the mean of the region
    the rest (BEiT, EVA, CaiT, ...)
        whole images only; other modes are refused by name

Weights are fresh; `vlp_core.weights.timm.load_timm` fills them from a local file of timm. Which mean and
deviation the pixels need is said by timm's `pretrained_cfg` of a model.

Source: timm (`pytorch-image-models`), documentation of "Feature Extraction"; regions: X-VLM, arXiv
2111.08276.

Shape letters: B texts, N images, R image side, G patches per side, L = G*G, T = 1+L tokens, D width, K other
tokens or kept patches.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from vlp_core.vision.encoder import ImageEncoder, Summarised
from vlp_core.vision.layers import (
    VisionRegions,
    check_image,
    check_regions,
    outside_bias,
    run_region_blocks,
    take_rows,
)
from vlp_core.vision.positions import resize_swin_table


class TimmVision(ImageEncoder):
    """A backbone of timm with fresh weights.

    Args:
        name: Name in timm, such as "vit_base_patch16_224" or "convnext_tiny.fb_in22k"; a tag changes nothing.
        image_size: Side of the images; exactly this size is accepted.
        drop_path: Stochastic depth, for architectures that have it.
        local_depth: Number of last blocks of a plain ViT that attend to the region only, in region mode.
        arguments: Further arguments of the architecture in timm, such as {"depth": 6}.

    Attributes: those of `ImageEncoder`; `body` is timm's model, `regions` says in words which region mode
        there is ("blocks", "pooled") or is None.

    Raises:
        ImportError: timm is not installed.
        ValueError: An unknown name; an architecture that does not take the size or an argument; features that
            are no square of patches.
    """

    def __init__(
        self,
        *,
        name: str,
        image_size: int,
        drop_path: float = 0.0,
        local_depth: int = 4,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.image_size = name, image_size
        self.body = _create(name, image_size, drop_path, arguments or {})
        self.local_depth = local_depth
        self._pools_always = False
        features = self._probe()
        self.width = features.shape[-1]
        self._prefix = _prefix_tokens(self.body, features)
        patches = (features.shape[1] * features.shape[2]) if features.ndim == 4 else features.shape[1]
        grid = math.isqrt(max(patches - self._prefix, 0))
        square = features.ndim == 3 or features.shape[1] == features.shape[2]
        if not (grid > 1 and square and grid * grid == patches - self._prefix):
            raise ValueError(
                f"{self.called} makes features of shape {list(features.shape)} of an image of {image_size} "
                "pixels, which are no square of patches; choose larger images or another architecture"
            )
        self.tokens = 1 + grid * grid
        self._class_token = self._prefix > 0 and _has_class_token(self.body)
        plain = _is_plain(self.body)
        if plain:
            self.patch_size = self.body.patch_embed.patch_size[0]
            if not 0 <= local_depth <= len(self.body.blocks):
                raise ValueError(
                    f"local_depth={local_depth} must lie between 0 and the {len(self.body.blocks)} blocks of "
                    f"{self.called}"
                )
        elif image_size % grid:
            raise ValueError(
                f"image_size={image_size} is no multiple of the {grid} x {grid} patches that {self.called} "
                "makes "
                "of it; choose a multiple of its stride"
            )
        else:
            self.patch_size = image_size // grid
        masked = plain and _takes_masks(self.body)
        self.depth = len(self.body.blocks) if plain and self._class_token else 0
        self.takes_others = masked
        self.keeps_patches = plain and _has_linear_patches(self.body)
        self.regions = "blocks" if masked else None if plain or self._prefix else "pooled"

    @property
    def called(self) -> str:
        """What messages call this encoder."""
        return f"timm's {self.name}"

    def forward(
        self, image: Tensor, others: Tensor | None = None, *, visible: Tensor | None = None
    ) -> Tensor:
        """[N, 3, R, R] -> [N, T, D]: whole image, patches row by row, other tokens.

        `others` and `visible` are for plain ViTs, as in `vlp_core.vision.VisionTransformer`: [N, K, D] tokens
        behind the patches in all blocks, and [N, T+K], 0 for tokens that nothing attends to.
        """
        check_image(image, self.image_size)
        if others is None and visible is None:
            return self._arrange(self._features(image))
        if not self.takes_others:
            raise ValueError(f"{self.called} takes no tokens beside its patches")
        x = self._embed(image, others)
        bias = None if visible is None else outside_bias(self._with_prefix(visible), x.dtype)
        for block in self.body.blocks:
            x = block(x, bias)
        return self._arrange(self.body.norm(x))

    def forward_regions(
        self,
        image: Tensor,
        image_index: Tensor,
        image_attention_mask: Tensor,
        others: Tensor | None = None,
    ) -> VisionRegions:
        """Regions of images; arguments as in `ImageEncoder.forward_regions`.

        `others`: [N, K, D] as in `forward`, visible to every region of their image.

        Raises:
            ValueError: An architecture without region mode, or shapes that do not fit.
        """
        check_image(image, self.image_size)
        check_regions(image, image_index, image_attention_mask, self.tokens)
        if self.regions is None:
            raise ValueError(
                f"{self.called} has no region mode: its blocks cannot attend to a part of the patches; train "
                "it "
                "on whole images, or take a plain ViT, a Swin or a convolutional network"
            )
        if self.regions == "pooled":
            if others is not None:
                raise ValueError(f"{self.called} takes no tokens beside its patches")
            full = self.forward(image)
            own = take_rows(full[:, 1:], image_index)
            return VisionRegions(torch.cat([_mean(own, image_attention_mask[:, 1:]), own], dim=1), full)
        beyond = 0 if others is None else others.shape[1]
        mask = F.pad(image_attention_mask, (0, beyond), value=1)
        found = run_region_blocks(
            self.body.blocks,
            self._embed(image, others),
            image_index,
            self._with_prefix(mask),
            local_depth=self.local_depth,
        )
        region, full = self.body.norm(found.image_embeds), self.body.norm(found.full_embeds)
        return VisionRegions(self._arrange(region, image_attention_mask[:, 1:]), self._arrange(full))

    def forward_with_summaries(
        self, image: Tensor, others: Tensor | None = None, *, count: int, visible: Tensor | None = None
    ) -> Summarised:
        """As `forward`, with the class token after each of the `count` blocks before the last one.

        Raises:
            ValueError: An architecture without class token or blocks of one width, or without so many.
        """
        if not self.depth:
            return super().forward_with_summaries(image, count=count)
        if not 0 < count < self.depth:
            raise ValueError(
                f"{count} summaries were asked for; {self.depth} blocks have 1..{self.depth - 1}"
            )
        check_image(image, self.image_size)
        x = self._embed(image, others)
        bias = None if visible is None else outside_bias(self._with_prefix(visible), x.dtype)
        tokens: list[Tensor] = []
        for block in self.body.blocks:
            x = block(x) if bias is None else block(x, bias)
            tokens.append(x[:, 0])
        norm = self.body.norm
        return Summarised(self._arrange(norm(x)), norm(torch.stack(tokens[-count - 1 : -1])))

    def forward_kept(self, patches_NKP: Tensor, ids_NK: Tensor) -> Tensor:
        """States of a part of the patches, whole image first: [N, 1+K, D].

        As in `vlp_core.vision.VisionTransformer` the class token (and other tokens before the patches) have
        no position here.

        Raises:
            ValueError: An architecture that cannot leave patches out.
        """
        if not self.keeps_patches:
            return super().forward_kept(patches_NKP, ids_NK)
        body, embed = self.body, self.body.patch_embed
        x = embed.norm(F.linear(patches_NKP, embed.proj.weight.flatten(1), embed.proj.bias))
        if body.pos_embed is not None:
            x = x + F.embedding(ids_NK, body.pos_embed[0, -(self.tokens - 1) :])
        first = [token for token in (body.cls_token, body.reg_token) if token is not None]
        x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in first), x], dim=1)
        return self._arrange(body.norm(body.blocks(body.norm_pre(x))))

    def position_tables(self) -> dict[str, Callable[[Tensor, Size], Tensor]]:
        """Parameters of the grid's or window's size, with the function(tensor, wanted shape) that resizes one
        of another size: positions as timm does, biases of windows as our Swin."""
        tables: dict[str, Callable[[Tensor, Size], Tensor]] = {}
        for key, parameter in self.body.named_parameters():
            if key == "pos_embed" and parameter.ndim == 3:
                tables[f"body.{key}"] = self._resize_positions
            elif key.endswith(".relative_position_bias_table") and _is_odd_square(len(parameter)):
                tables[f"body.{key}"] = _resize_bias
        return tables

    def _probe(self) -> Tensor:
        """Features of an empty image."""
        pixels = next(self.body.parameters()).new_zeros(1, 3, self.image_size, self.image_size)
        self.body.eval()
        try:
            with torch.no_grad():
                plain = self.body.forward_features(pixels)
                head = self.body.forward_head(plain, pre_logits=True)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"{self.called} does not take images of {self.image_size} pixels: {error}"
            ) from error
        finally:
            self.body.train(self.training)
        if not isinstance(plain, Tensor):
            # Not a type error: the name is at fault.
            raise ValueError(  # noqa: TRY004
                f"{self.called} gives several maps of features; choose an architecture that gives one"
            )
        # Some heads pool whatever they are told.
        self._pools_always = not isinstance(head, Tensor) or head.ndim < 3
        return self._in_rows(plain if self._pools_always else head)

    def _features(self, image: Tensor) -> Tensor:
        """[N, prefix + L, D] or [N, G, G, D], normalised."""
        x = self.body.forward_features(image)
        if not self._pools_always:
            x = self.body.forward_head(x, pre_logits=True)
        return self._in_rows(x)

    def _in_rows(self, x: Tensor) -> Tensor:
        """Maps of features with the channels last; sequences as they are."""
        return x.permute(0, 2, 3, 1) if x.ndim == 4 and not _is_channels_last(self.body) else x

    def _arrange(self, features: Tensor, weights_NL: Tensor | None = None) -> Tensor:
        """Tokens in our order: whole image, patches, other tokens.

        `weights`: of the patches in their mean, where that is the first token.
        """
        x = features.flatten(1, 2) if features.ndim == 4 else features
        rest = x[:, self._prefix :]
        first = x[:, :1] if self._class_token else _mean(rest[:, : self.tokens - 1], weights_NL)
        return torch.cat([first, rest], dim=1)

    def _embed(self, image: Tensor, others: Tensor | None) -> Tensor:
        """Tokens of a plain ViT before its blocks: [N, prefix + L + K, D]."""
        body = self.body
        x = body.norm_pre(body.patch_drop(body._pos_embed(body.patch_embed(image))))
        return x if others is None else torch.cat([x, others.to(x.dtype)], dim=1)

    def _with_prefix(self, mask_NT: Tensor) -> Tensor:
        """A mask of our tokens as one of timm's, whose tokens before the patches are visible."""
        return F.pad(mask_NT[:, 1:], (self._prefix, 0), value=1)

    def _resize_positions(self, table: Tensor, shape: Size) -> Tensor:
        from timm.layers import resample_abs_pos_embed

        grid = math.isqrt(self.tokens - 1)
        before = shape[1] - grid * grid
        side = math.isqrt(max(table.shape[1] - before, 0))
        if before < 0 or side * side != table.shape[1] - before:
            raise ValueError(f"a table of shape {list(table.shape)} is no square of positions")
        return resample_abs_pos_embed(table, new_size=[grid, grid], num_prefix_tokens=before)


def _create(name: str, image_size: int, drop_path: float, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError("vision kind timm needs timm: pip install 'vlp-core[timm]'") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() lists them"
        raise ValueError(f"timm has no model {name!r}{hint}")
    given = dict(arguments)
    if reserved := sorted(
        {"img_size", "num_classes", "global_pool", "drop_path_rate", "pretrained"} & set(given)
    ):
        raise ValueError(
            f"arguments of timm's {name} cannot hold {', '.join(reserved)}, which image_size and drop_path "
            "say or "
            "which are fixed"
        )
    if drop_path:
        given["drop_path_rate"] = drop_path
    # Architectures that work for any size do not take one.
    configuration = timm.get_pretrained_cfg(name)
    if configuration is not None and configuration.fixed_input_size:
        given["img_size"] = image_size
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, global_pool="", **given)
    except (TypeError, ValueError, AssertionError) as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in given.items()) or "no arguments"
        raise ValueError(f"timm's {name} cannot be made with {shown}: {error}") from error


def _is_channels_last(body: nn.Module) -> bool:
    return str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")


def _prefix_tokens(body: nn.Module, features: Tensor) -> int:
    """How many tokens stand before the patches."""
    if features.ndim == 4:
        return 0
    known = getattr(body, "num_prefix_tokens", None)
    if known is not None:
        return int(known)
    count = features.shape[1]
    return 0 if math.isqrt(count) ** 2 == count else 1


def _has_class_token(body: nn.Module) -> bool:
    """Whether the first of the tokens before the patches stands for the whole image (others are
    registers)."""
    return bool(getattr(body, "has_class_token", getattr(body, "cls_token", None) is not None))


def _is_plain(body: nn.Module) -> bool:
    """Whether this is a ViT whose steps `TimmVision` can take one by one."""
    from timm.models.vision_transformer import VisionTransformer

    # Subclasses add tokens or steps of their own.
    return type(body) is VisionTransformer and isinstance(body.patch_drop, nn.Identity)


def _takes_masks(body: nn.Module) -> bool:
    """Whether the blocks take an attention mask, which depends on their kind and on timm's version."""
    from timm.models import vision_transformer as module

    kinds = (module.Block, module.ResPostBlock, module.ParallelScalingBlock)
    return all(
        type(block) in kinds and "attn_mask" in inspect.signature(block.forward).parameters
        for block in body.blocks
    )


def _has_linear_patches(body: nn.Module) -> bool:
    """Whether a patch becomes a token by one linear map, so that it can be left out."""
    from timm.layers import PatchEmbed

    return type(body.patch_embed) is PatchEmbed and isinstance(body.patch_embed.proj, nn.Conv2d)


def _mean(x_NLD: Tensor, weights_NL: Tensor | None) -> Tensor:
    """[N, 1, D], over all patches or by weights."""
    if weights_NL is None:
        return x_NLD.mean(1, keepdim=True)
    weights = weights_NL[:, :, None].to(x_NLD.dtype)
    return (weights * x_NLD).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


def _is_odd_square(rows: int) -> bool:
    side = math.isqrt(rows)
    return side * side == rows and side % 2 == 1


def _resize_bias(table: Tensor, shape: Size) -> Tensor:
    return resize_swin_table(table, (math.isqrt(shape[0]) + 1) // 2)
