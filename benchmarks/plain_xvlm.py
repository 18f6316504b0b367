"""X-VLM pre-training written down plainly, as the yardstick of `pretrain_step.py`: one operation after the
other, nothing shared.

Written from the description of the method, for Swin and BERT, on the official parameter names. Plain means:

- Swin rolls and cuts the image in every block, looks its bias up by index and softmaxes written-out scores;
- positives and negatives of image-text matching are two passes of the fusion layers, masked tokens a third
    one from the first layer on, boxes a fourth;
  each projects its images to keys and values again;
- negatives are drawn one at a time in a Python loop with `.item()`;
- the language head runs over all positions (`all_positions=False`: at the masked ones only);
- text layers and optimizer are those of `plain_text.py`.

Source: arXiv 2111.08276. Shape letters: B texts, N images, L patches, T tokens, D image width, W text width.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from plain_text import PlainText
from torch import Tensor


class PlainXvlm(PlainText):
    """Losses of a batch on a dict of official parameters; dropout and stochastic depth are off."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        *,
        image_size: int,
        window: int,
        heads: list[int],
        text_heads: int,
        fusion_layer: int,
        text_eps: float,
        all_positions: bool,
    ) -> None:
        tied = ("text_encoder.cls.predictions.decoder.weight", "text_encoder.cls.predictions.decoder.bias")
        parameters = {
            name: tensor.detach().clone().requires_grad_()
            for name, tensor in state.items()
            if tensor.is_floating_point() and name not in tied and not name.endswith("attn_mask")
        }
        super().__init__(parameters, text_heads=text_heads, fusion_layer=fusion_layer, text_eps=text_eps)
        self.all_positions = all_positions
        self.heads = heads
        self.stages = []
        for stage in range(len(heads)):
            side = image_size // 4 // 2**stage
            cut = min(window, side)
            shift = window // 2 if window < side else 0
            depth = 1 + max(
                int(n.split(".")[4]) for n in self.p if n.startswith(f"vision_encoder.layers.{stage}.blocks.")
            )
            self.stages.append((side, cut, shift, depth))
        self.indices = {cut: relative_index(cut) for _, cut, _, _ in self.stages}
        self.masks = [
            shifted_mask(side, cut, shift) if shift else None for side, cut, shift, _ in self.stages
        ]

    def losses(
        self,
        image: Tensor,
        text_ids: Tensor,
        attention_mask: Tensor,
        masked_ids: Tensor,
        masked_positions: Tensor,
        masked_labels: Tensor,
        *,
        image_index: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        target_boxes: Tensor | None = None,
        is_image: Tensor | None = None,
        negatives: tuple[list[int], list[int]] | None = None,
    ) -> dict[str, Tensor]:
        """itc, itm, mlm, and for region batches bbox and giou."""
        patches = self.swin(image)
        whole = torch.cat([patches.mean(1, keepdim=True), patches], dim=1)
        if image_index is None:
            embeds, mask = whole, torch.ones(whole.shape[:2])
        else:
            own = patches[image_index]
            weights = image_attention_mask[:, 1:, None].float()
            pooled = (weights * own).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
            embeds, mask = torch.cat([pooled, own], dim=1), image_attention_mask
        text = self.encode_text(text_ids, attention_mask)
        with torch.no_grad():
            self.p["temp"].clamp_(0.001, 0.5)
        image_feature = F.normalize(self.linear("vision_proj", embeds[:, 0]), dim=-1)
        text_feature = F.normalize(self.linear("text_proj", text[:, 0]), dim=-1)
        batch = len(text)

        logits = image_feature @ text_feature.t() / self.p["temp"]
        labels = torch.arange(batch)
        losses = {"itc": (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2}

        if negatives is None:
            negatives = self.draw(image_feature, text_feature)
        positive = self.fuse(text, attention_mask, embeds, mask)[:, 0]
        image_negatives = torch.stack([embeds[i] for i in negatives[0]])
        mask_negatives = torch.stack([mask[i] for i in negatives[0]])
        text_negatives = torch.stack([text[i] for i in negatives[1]])
        attention_negatives = torch.stack([attention_mask[i] for i in negatives[1]])
        negative = self.fuse(
            torch.cat([text, text_negatives]),
            torch.cat([attention_mask, attention_negatives]),
            torch.cat([image_negatives, embeds]),
            torch.cat([mask_negatives, mask]),
        )[:, 0]
        matches = self.head("itm_head", torch.cat([positive, negative]))
        losses["itm"] = F.cross_entropy(
            matches, torch.cat([torch.ones(batch), torch.zeros(2 * batch)]).long()
        )

        states = self.fuse(self.encode_text(masked_ids, attention_mask), attention_mask, embeds, mask)
        if self.all_positions:
            scores = self.language_head(states)
            wanted = torch.full(text_ids.shape, -100)
            row, place = (masked_labels != -100).nonzero(as_tuple=True)
            wanted[row, masked_positions[row, place]] = masked_labels[row, place]
        else:
            width = states.shape[-1]
            scores = self.language_head(states.gather(1, masked_positions[..., None].expand(-1, -1, width)))
            wanted = masked_labels
        losses["mlm"] = F.cross_entropy(scores.flatten(0, 1), wanted.flatten())

        if image_index is not None:
            full = whole[image_index]
            first = self.fuse(text, attention_mask, full, torch.ones(full.shape[:2]))[:, 0]
            boxes = self.head("bbox_head", first).sigmoid()
            counted = 1 - is_image.float()
            low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
            low_t, high_t = (
                target_boxes[:, :2] - target_boxes[:, 2:] / 2,
                target_boxes[:, :2] + target_boxes[:, 2:] / 2,
            )
            both = (torch.min(high, high_t) - torch.max(low, low_t)).clamp(min=0).prod(1)
            either = (high - low).prod(1) + (high_t - low_t).prod(1) - both
            hull = (torch.max(high, high_t) - torch.min(low, low_t)).prod(1)
            giou = 1 - (both / either - (hull - either) / hull)
            losses["bbox"] = ((boxes - target_boxes).abs().sum(1) * counted).sum() / counted.sum()
            losses["giou"] = (giou * counted).sum() / counted.sum()
        return losses

    @torch.no_grad()
    def draw(self, image_feature: Tensor, text_feature: Tensor) -> tuple[list[int], list[int]]:
        """One negative image per text, then one negative text per image, each by its own draw."""
        similarity = image_feature @ text_feature.t() / self.p["temp"]
        of_image, of_text = (s.softmax(1) + 1e-5 for s in (similarity, similarity.t()))
        of_image.fill_diagonal_(0)
        of_text.fill_diagonal_(0)
        images = [int(torch.multinomial(of_text[b], 1).item()) for b in range(len(of_text))]
        texts = [int(torch.multinomial(of_image[b], 1).item()) for b in range(len(of_image))]
        return images, texts

    # ---- parts

    def head(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.3", F.gelu(self.norm(f"{name}.1", self.linear(f"{name}.0", x), 1e-5)))

    def swin(self, image: Tensor) -> Tensor:
        p, root = self.p, "vision_encoder"
        x = F.conv2d(
            image, p[f"{root}.patch_embed.proj.weight"], p[f"{root}.patch_embed.proj.bias"], stride=4
        )
        x = self.norm(f"{root}.patch_embed.norm", x.flatten(2).transpose(1, 2), 1e-5)
        for number, ((side, cut, shift, depth), mask) in enumerate(zip(self.stages, self.masks, strict=True)):
            for block in range(depth):
                moved = shift if block % 2 else 0
                name = f"{root}.layers.{number}.blocks.{block}"
                y = self.norm(f"{name}.norm1", x, 1e-5).view(len(x), side, side, -1)
                y = torch.roll(y, (-moved, -moved), (1, 2)) if moved else y
                y = self.window_attention(
                    name, cut_windows(y, cut), self.heads[number], cut, mask if moved else None
                )
                y = join_windows(y, cut, side)
                y = torch.roll(y, (moved, moved), (1, 2)) if moved else y
                x = x + y.reshape(len(x), side * side, -1)
                y = F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x, 1e-5)))
                x = x + self.linear(f"{name}.mlp.fc2", y)
            if number + 1 < len(self.stages):
                y = x.view(len(x), side, side, -1)
                y = torch.cat([y[:, 0::2, 0::2], y[:, 1::2, 0::2], y[:, 0::2, 1::2], y[:, 1::2, 1::2]], -1)
                y = self.norm(f"{root}.layers.{number}.downsample.norm", y.flatten(1, 2), 1e-5)
                x = F.linear(y, p[f"{root}.layers.{number}.downsample.reduction.weight"])
        return self.norm(f"{root}.norm", x, 1e-5)

    def window_attention(self, name: str, x: Tensor, heads: int, cut: int, mask: Tensor | None) -> Tensor:
        windows, tokens, width = x.shape
        qkv = self.linear(f"{name}.attn.qkv", x).view(windows, tokens, 3, heads, width // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q * (width // heads) ** -0.5) @ k.transpose(-2, -1)
        table = self.p[f"{name}.attn.relative_position_bias_table"]
        scores = scores + table[self.indices[cut].view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)[None]
        if mask is not None:
            scores = scores.view(-1, len(mask), heads, tokens, tokens) + mask[None, :, None]
            scores = scores.view(windows, heads, tokens, tokens)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(windows, tokens, width)
        return self.linear(f"{name}.attn.proj", mixed)


def cut_windows(x: Tensor, cut: int) -> Tensor:
    batch, side, _, width = x.shape
    x = x.view(batch, side // cut, cut, side // cut, cut, width).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, cut * cut, width)


def join_windows(x: Tensor, cut: int, side: int) -> Tensor:
    x = x.view(-1, side // cut, side // cut, cut, cut, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, side, side, x.shape[-1])


def relative_index(cut: int) -> Tensor:
    """[cut^2, cut^2]: row of the bias table for query and key."""
    place = torch.stack(torch.meshgrid(torch.arange(cut), torch.arange(cut), indexing="ij")).flatten(1)
    offset = place[:, :, None] - place[:, None, :] + cut - 1
    return offset[0] * (2 * cut - 1) + offset[1]


def shifted_mask(side: int, cut: int, shift: int) -> Tensor:
    """[windows, cut^2, cut^2]: -100 between tokens that only the roll made neighbours."""
    area = torch.zeros(1, side, side, 1)
    parts = (slice(0, -cut), slice(-cut, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in parts for c in parts):
        area[:, rows, columns] = number
    area = cut_windows(area, cut).squeeze(-1)
    return (area[:, None, :] != area[:, :, None]) * -100.0
