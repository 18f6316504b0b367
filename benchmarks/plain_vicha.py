"""ViCHA pre-training written down plainly, as the yardstick of `vicha_step.py`: one operation after the
other, nothing shared.

Written from the description of the method, for ViT and BERT, on the official parameter names. Plain means,
beside `plain_text.py`:

- the image blocks write out scores and softmax of their attention;
- masked images mask after all patches were projected, and the whole mask is built by gathers;
- positives and negatives of image-text matching are two passes of the fusion layers, masked texts a third one
    from the first layer on, and
  the teacher's a fourth; each projects its images to keys and values again;
- negatives are drawn one at a time in a Python loop with `.item()`;
- student and teacher predict the whole vocabulary at every position;
- similarities with the queue, targets and log-softmax are whole matrices;
- teacher and optimizer are updated parameter by parameter.

Source: arXiv 2208.13628; ALBEF, arXiv 2107.07651. Shape letters: B pairs, L patches, K concept tokens, T
tokens, D image width, W text width.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from plain_text import PlainText
from torch import Tensor

MOMENTUM, ALPHA, HIDDEN_WEIGHT = 0.995, 0.4, 0.1


class PlainVicha(PlainText):
    """Losses of a batch on a dict of official parameters; dropout is off."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        *,
        patch: int,
        image_heads: int,
        decoder_heads: int,
        text_heads: int,
        fusion_layer: int,
        text_eps: float,
        levels: int,
        mask_ratio: float,
    ) -> None:
        fixed = ("image_queue", "text_queue", "queue_ptr", "decoder_pos_embed")
        tied = (".cls.predictions.decoder.weight", ".cls.predictions.decoder.bias")
        parameters = {
            name: tensor.detach().clone()
            for name, tensor in state.items()
            if not name.endswith((*tied, "position_ids"))
        }
        for name, tensor in parameters.items():
            tensor.requires_grad_(name not in fixed and not name.split(".")[0].endswith("_m"))
        super().__init__(parameters, text_heads=text_heads, fusion_layer=fusion_layer, text_eps=text_eps)
        self.patch, self.image_heads, self.decoder_heads = patch, image_heads, decoder_heads
        self.levels, self.mask_ratio = levels, mask_ratio
        self.concept_layers = self.count_layers("kw_encoder")

    def trained(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.p.items() if tensor.requires_grad}

    def losses(
        self,
        image: Tensor,
        text_ids: Tensor,
        attention_mask: Tensor,
        masked_ids: Tensor,
        masked_positions: Tensor,
        masked_labels: Tensor,
        concept_ids: Tensor,
        concept_mask: Tensor,
        *,
        negatives: tuple[Sequence[int], Sequence[int]] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """itc, itm, mlm, hidden, mim."""
        batch = len(text_ids)
        with torch.no_grad():
            self.p["temp"].clamp_(0.001, 0.5)
        t = self.p["temp"]
        embeds, image_states = self.see(image, concept_ids, concept_mask, "")
        seen = torch.ones(embeds.shape[:2])
        text_states = [self.embed(text_ids)]
        for number in range(self.fusion_layer):
            text_states.append(self.bert_layer(number, text_states[-1], attention_mask, None, None))
        text = text_states[-1]
        image_feature = F.normalize(self.linear("vision_proj", embeds[:, 0]), dim=-1)
        text_feature = F.normalize(self.linear("text_proj", text[:, 0]), dim=-1)

        with torch.no_grad():
            for name, own in self.p.items():
                first, dot, rest = name.partition(".")
                if first.endswith("_m"):
                    followed = self.p[first.removesuffix("_m") + dot + rest]
                    own.copy_(own * MOMENTUM + followed * (1 - MOMENTUM))
            embeds_m, _ = self.see(image, concept_ids, concept_mask, "_m")
            text_m = self.encode_text(text_ids, attention_mask, "text_encoder_m.bert")
            image_feature_m = F.normalize(self.linear("vision_proj_m", embeds_m[:, 0]), dim=-1)
            text_feature_m = F.normalize(self.linear("text_proj_m", text_m[:, 0]), dim=-1)
            image_keys = torch.cat([image_feature_m.t(), self.p["image_queue"].clone()], dim=1)
            text_keys = torch.cat([text_feature_m.t(), self.p["text_queue"].clone()], dim=1)
            hard = torch.zeros(batch, image_keys.shape[1]).fill_diagonal_(1)
            targets = [
                ALPHA * (feature @ keys / t).softmax(1) + (1 - ALPHA) * hard
                for feature, keys in ((image_feature_m, text_keys), (text_feature_m, image_keys))
            ]
        similarities = image_feature @ text_keys / t, text_feature @ image_keys / t
        both = [
            -(s.log_softmax(1) * target).sum(1).mean()
            for s, target in zip(similarities, targets, strict=True)
        ]
        losses = {"itc": (both[0] + both[1]) / 2}

        hidden = []
        for level in range(self.levels):
            x = F.normalize(
                self.linear(f"vision_proj_hidden.{level}", image_states[level - self.levels - 1][:, 0]),
                dim=-1,
            )
            y = F.normalize(
                self.linear(f"text_proj_hidden.{level}", text_states[level - self.levels - 1][:, 0]), dim=-1
            )
            labels = torch.arange(batch)
            hidden.append(
                (
                    F.cross_entropy(x @ y.detach().t() / t, labels)
                    + F.cross_entropy(y @ x.detach().t() / t, labels)
                )
                / 2
            )
        losses["hidden"] = HIDDEN_WEIGHT * torch.stack(hidden).sum()

        if negatives is None:
            negatives = self.draw(similarities[0][:, :batch], similarities[1][:, :batch])
        positive = self.fuse(text, attention_mask, embeds, seen)[:, 0]
        negative = self.fuse(
            torch.cat([text, torch.stack([text[i] for i in negatives[1]])]),
            torch.cat([attention_mask, torch.stack([attention_mask[i] for i in negatives[1]])]),
            torch.cat([torch.stack([embeds[i] for i in negatives[0]]), embeds]),
            torch.cat([seen, seen]),
        )[:, 0]
        matches = self.linear("itm_head", torch.cat([positive, negative]))
        losses["itm"] = F.cross_entropy(
            matches, torch.cat([torch.ones(batch), torch.zeros(2 * batch)]).long()
        )

        labels = torch.full(text_ids.shape, -100)
        row, place = (masked_labels != -100).nonzero(as_tuple=True)
        labels[row, masked_positions[row, place]] = masked_labels[row, place]
        with torch.no_grad():
            encoder = "text_encoder_m.bert"
            states_m = self.fuse(
                self.encode_text(masked_ids, attention_mask, encoder), attention_mask, embeds_m, seen, encoder
            )
            believed = self.language_head(states_m, "text_encoder_m").softmax(-1)
        scores = self.language_head(
            self.fuse(self.encode_text(masked_ids, attention_mask), attention_mask, embeds, seen)
        )
        plain = F.cross_entropy(scores.flatten(0, 1), labels.flatten())
        soft = -(scores.log_softmax(-1) * believed).sum(-1)
        losses["mlm"] = (1 - ALPHA) * plain + ALPHA * soft[labels != -100].mean()

        losses["mim"] = self.masked_images(image, noise)
        self.enqueue(image_feature_m, text_feature_m)
        return losses

    @torch.no_grad()
    def draw(self, of_image: Tensor, of_text: Tensor) -> tuple[list[int], list[int]]:
        """One negative image per text, then one negative text per image, each by its own draw."""
        of_image, of_text = of_image.softmax(1), of_text.softmax(1)
        of_image.fill_diagonal_(0)
        of_text.fill_diagonal_(0)
        images = [int(torch.multinomial(of_text[b], 1).item()) for b in range(len(of_text))]
        texts = [int(torch.multinomial(of_image[b], 1).item()) for b in range(len(of_image))]
        return images, texts

    @torch.no_grad()
    def enqueue(self, image_feature: Tensor, text_feature: Tensor) -> None:
        pointer, size = int(self.p["queue_ptr"]), self.p["image_queue"].shape[1]
        self.p["image_queue"][:, pointer : pointer + len(image_feature)] = image_feature.t()
        self.p["text_queue"][:, pointer : pointer + len(text_feature)] = text_feature.t()
        self.p["queue_ptr"][0] = (pointer + len(image_feature)) % size

    # ---- images

    def see(self, image: Tensor, ids: Tensor, mask: Tensor, copy: str) -> tuple[Tensor, list[Tensor]]:
        """States behind the last block and normalised ones behind each block; `copy` is "_m" for the
        teacher."""
        words = self.embed(ids, f"kw_encoder{copy}")
        for number in range(self.concept_layers):
            words = self.bert_layer(number, words, mask, None, None, f"kw_encoder{copy}")
        root = f"visual_encoder{copy}"
        x = self.patches(image, root)
        x = torch.cat([self.p[f"{root}.cls_token"].expand(len(x), -1, -1), x], dim=1)
        x = x + self.p[f"{root}.pos_embed"]
        return self.blocks(torch.cat([x, self.linear(f"kw_proj{copy}", words)], dim=1), root)

    def patches(self, image: Tensor, root: str) -> Tensor:
        weight, bias = self.p[f"{root}.patch_embed.proj.weight"], self.p[f"{root}.patch_embed.proj.bias"]
        return F.conv2d(image, weight, bias, stride=self.patch).flatten(2).transpose(1, 2)

    def blocks(self, x: Tensor, root: str) -> tuple[Tensor, list[Tensor]]:
        states = []
        for number in range(1 + max(int(n.split(".")[2]) for n in self.p if n.startswith(f"{root}.blocks."))):
            x = self.block(f"{root}.blocks.{number}", x, self.image_heads)
            states.append(self.norm(f"{root}.norm", x, 1e-6))
        return states[-1], states

    def block(self, name: str, x: Tensor, heads: int) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x, 1e-6))
        q, k, v = qkv.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (width // heads) ** -0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.linear(f"{name}.attn.proj", mixed)
        y = F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x, 1e-6)))
        return x + self.linear(f"{name}.mlp.fc2", y)

    def masked_images(self, image: Tensor, noise: Tensor | None) -> Tensor:
        root = "visual_encoder"
        x = self.patches(image, root) + self.p[f"{root}.pos_embed"][:, 1:]
        batch, length, width = x.shape
        noise = torch.rand(batch, length) if noise is None else noise
        shuffle = noise.argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        count = int(length * (1 - self.mask_ratio))
        kept = torch.gather(x, 1, shuffle[:, :count, None].repeat(1, 1, width))
        removed = torch.ones(batch, length)
        removed[:, :count] = 0
        removed = torch.gather(removed, 1, restore)
        x = torch.cat([self.p[f"{root}.cls_token"].expand(batch, -1, -1), kept], dim=1)
        x, _ = self.blocks(x, root)
        x = self.linear("decoder_embed", x)
        filled = torch.cat([x[:, 1:], self.p["mask_token"].repeat(batch, length - count, 1)], dim=1)
        filled = torch.gather(filled, 1, restore[..., None].repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1], filled], dim=1) + self.p["decoder_pos_embed"]
        for number in range(1 + max(int(n.split(".")[1]) for n in self.p if n.startswith("decoder_blocks."))):
            x = self.block(f"decoder_blocks.{number}", x, self.decoder_heads)
        predicted = self.linear("mae_proj", self.norm("decoder_norm", x, 1e-5))[:, 1:]
        side = math.isqrt(length)
        target = image.view(batch, 3, side, self.patch, side, self.patch).permute(0, 2, 4, 3, 5, 1)
        target = target.reshape(batch, length, -1)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        error = ((predicted - target) ** 2).mean(-1)
        return (error * removed).sum() / removed.sum()
