"""From texts to ids: clean-up, framing, masking, and how an export says that it reads texts.

Source: data specification 2; X-VLM specification 4.2.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from vlp_data.checks import from_mapping, positive
from vlp_data.cleaning import Clean, cleaned, names_a_side, pre_caption, pre_question
from vlp_data.errors import BadSample
from vlp_data.masking import draw_independently, mask_independently, mask_tokens
from vlp_data.options import IndependentMasking, Masking, TextOptions
from vlp_data.tokenizer import Encoded, Tokenizer

__all__ = [
    "Encoded",
    "MaskedText",
    "MaskedTexts",
    "Reading",
    "Tokenizer",
    "collate_ids",
    "collate_masked",
    "masked_text",
    "names_a_side",
    "pre_caption",
    "pre_question",
    "text_ids",
]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a text becomes ids, apart from the tokenizer: one thing in training, evaluation and export."""

    clean: Clean = "caption"
    """The clean-up of captions, of questions, or none."""
    max_words: int = 30
    """Words kept by the clean-up; "none" keeps all."""
    max_tokens: int | None = None
    """Ids kept, special tokens included; None keeps all."""
    separator: bool = False
    """End texts with the end token ([SEP]), as ALBEF, VLC and CLIP do; X-VLM and ViCHA do not."""

    def __post_init__(self) -> None:
        positive(self, "max_words")
        if self.max_tokens is not None and self.max_tokens < 2 + self.separator:
            raise ValueError(
                f"max_tokens={self.max_tokens} leaves no room for a word beside the special tokens"
            )

    @classmethod
    def of(cls, text: TextOptions, *, clean: Clean = "caption") -> Self:
        """How a model that was trained with `text` reads; `clean` counts where the options leave it open."""
        return cls(
            clean=text.clean or clean,
            max_words=text.max_words,
            max_tokens=text.max_tokens,
            separator=text.separator,
        )

    def encode(self, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device | str) -> Encoded:
        """Texts as ids and mask on a device, padded to the longest. Raises ValueError for a caption without a
        word."""
        words = [cleaned(text, self.clean, self.max_words) for text in texts]
        encoded = tokenizer.encode(words, max_tokens=self.max_tokens, separator=self.separator)
        return Encoded(*(x.to(device) for x in encoded))

    def config(self) -> dict[str, Any]:
        """What an export stores; `from_config` reads it."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From `config()`. The key `tokenizer`, which an export keeps beside these, is left to
        `TokenizerFiles.from_config`. Raises ValueError for an unknown key or value."""
        own = {key: value for key, value in config.items() if key != "tokenizer"}
        return from_mapping(cls, own, ("clean", "max_words", "max_tokens", "separator"), "reading")


def text_ids(
    text: str,
    tokenizer: Tokenizer,
    options: TextOptions,
    *,
    clean: Clean = "caption",
    prompt: str = "",
) -> list[int]:
    """Clean, tokenise and frame one text. `clean` is meant where the options leave it open; `prompt` is put
    before the cleaned text as it is, its own blank included. Raises BadSample ("empty text") for a text
    without a word."""
    if options.tokenized:
        ids = tokenizer.piece_ids(text.strip().split(" ")) if text.strip() else []
        start = tokenizer.token_ids(prompt.rstrip(" ")) if prompt else []
    else:
        words = cleaned(text, options.clean or clean, options.max_words, empty="keep")
        ids, start = tokenizer.token_ids(prompt + words) if words.strip() else [], []
    if not ids:
        raise BadSample("empty text", "", f"{text!r} holds no word")
    return tokenizer.frame([*start, *ids], max_tokens=options.max_tokens, separator=options.separator)


def collate_ids(rows: Sequence[Sequence[int]], tokenizer: Tokenizer, options: TextOptions) -> Encoded:
    """Rows of ids as tensors, padded as the options say."""
    return tokenizer.pad(rows, options.max_tokens if options.pad == "max" else None)


class MaskedText(NamedTuple):
    """One text as lists: its ids, the ids with masked tokens, and the positions to predict."""

    ids: list[int]
    masked_ids: list[int]
    positions: list[int]


def masked_text(
    text: str, tokenizer: Tokenizer, options: TextOptions, masking: Masking, rng: random.Random
) -> MaskedText:
    """Clean, tokenise, frame and mask one text. Raises BadSample ("empty text") when fewer than two ids come
    out, and DataError when the tokenizer has no mask token."""
    ids, mask_id = text_ids(text, tokenizer, options), tokenizer.require_mask()
    if isinstance(masking, IndependentMasking):
        draws = draw_independently(len(ids), masking, vocabulary=tokenizer.vocabulary, rng=rng)
        never = (tokenizer.cls_id, tokenizer.pad_id)
        return MaskedText(ids, *mask_independently(ids, draws, mask_id=mask_id, never=never))
    masked = mask_tokens(
        ids,
        tokenizer.continues(ids) if masking.whole_words else [False] * len(ids),
        masking,
        mask_id=mask_id,
        vocabulary=tokenizer.vocabulary,
        rng=rng,
    )
    return MaskedText(ids, masked.ids, masked.positions)


class MaskedTexts(NamedTuple):
    """The text fields of a batch; names and shapes as in `vlp_data.batch.ImageTextBatch`."""

    text_ids: Tensor
    attention_mask: Tensor
    masked_ids: Tensor
    masked_positions: Tensor
    masked_labels: Tensor


def collate_masked(
    texts: Sequence[MaskedText], tokenizer: Tokenizer, options: TextOptions, masking: Masking
) -> MaskedTexts:
    """Pad texts to tensors: ids with the pad id, positions with 0, labels with -100.

    There are as many masked positions as `masking` allows; where it allows any number, as many as a text has
    tokens after [CLS], or, with `pad` "longest", as the text with most of them has, at least one.
    """
    ids, attention_mask = collate_ids([text.ids for text in texts], tokenizer, options)
    masked_ids, _ = collate_ids([text.masked_ids for text in texts], tokenizer, options)
    if not isinstance(masking, IndependentMasking):
        width = masking.max_masks
    elif options.pad == "max":
        width = options.max_tokens - 1
    else:
        width = max(1, *(len(text.positions) for text in texts))
    positions = torch.zeros((len(texts), width), dtype=torch.int64)
    labels = torch.full((len(texts), width), -100)
    for row, text in enumerate(texts):
        count = len(text.positions)
        positions[row, :count] = torch.tensor(text.positions, dtype=torch.int64)
        labels[row, :count] = torch.tensor([text.ids[p] for p in text.positions], dtype=torch.int64)
    return MaskedTexts(ids, attention_mask, masked_ids, positions, labels)
