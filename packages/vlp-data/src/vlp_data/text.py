"""Clean-up of captions and questions, and tokenizers.

Source: data specification 2; X-VLM specification 5.6 and 5.7 (dataset/utils.py, dataset/tokenization).
"""

import json
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from vlp_data import files
from vlp_data.errors import BadSample, DataError
from vlp_data.masking import draw_independently, mask_independently, mask_tokens
from vlp_data.options import IndependentMasking, Masking, TextOptions

_REMOVED = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})
_RUN_OF_BLANKS = re.compile(r"\s{2,}")


def pre_caption(text: str, max_words: int, *, empty: Literal["error", "keep"] = "error") -> str:
    """Clean a caption as the ALBEF family does: lower case, punctuation removed, `-` and `/` to blanks,
    "<person>" to "person", runs of blanks to one, first `max_words` words.

    An empty result raises ValueError (X-VLM) or is returned as "" (`empty="keep"`; ALBEF, ViCHA).
    """
    cleaned = text.lower().translate(_REMOVED).replace("<person>", "person")
    cleaned = _RUN_OF_BLANKS.sub(" ", cleaned).rstrip("\n").strip(" ")
    cleaned = " ".join(cleaned.split(" ")[:max_words])
    if not cleaned and empty == "error":
        raise ValueError(f"caption {text!r} holds no word")
    return cleaned


def pre_question(text: str, max_words: int) -> str:
    """Clean a question as the ALBEF family does: as a caption, but only blanks at the end go and inner double
    blanks count as words."""
    cleaned = text.lower().translate(_REMOVED).rstrip(" ")
    return " ".join(cleaned.split(" ")[:max_words])


def names_a_side(text: str, *, whole_word: bool) -> bool:
    """Whether a text says left or right; not `whole_word`: inside another word too ("bright"), the
    reference's test."""
    if whole_word:
        return re.search(r"\b(left|right)\b", text, re.IGNORECASE) is not None
    return "left" in text or "right" in text


class Encoded(NamedTuple):
    """ids [B, L] int64 and attention_mask [B, L] int64 (1 = token)."""

    ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True, kw_only=True)
class _Special:
    cls: str
    sep: str
    pad: str
    mask: str
    unknown: str


_BERT = _Special(cls="[CLS]", sep="[SEP]", pad="[PAD]", mask="[MASK]", unknown="[UNK]")
_ROBERTA = _Special(cls="<s>", sep="</s>", pad="<pad>", mask="<mask>", unknown="<unk>")


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to ids. Make one with `Tokenizer.wordpiece` or `Tokenizer.roberta`; picklable."""

    kind: Literal["bert", "roberta"]
    backend: tokenizers.Tokenizer = field(repr=False)
    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    unknown_id: int
    vocabulary: int
    """Number of ids."""

    @classmethod
    def wordpiece(cls, vocab_file: str | Path, *, lowercase: bool = True) -> Self:
        """BERT's tokenizer from `vocab.txt` (one piece per line, the line number is the id); a path or fsspec
        URL.

        Raises DataError when the file is missing or lacks a special token.
        """
        words = _read_lines(vocab_file)
        vocabulary = {word: number for number, word in enumerate(words)}
        if len(vocabulary) != len(words):
            twice = next(word for number, word in enumerate(words) if vocabulary[word] != number)
            raise DataError(f"{vocab_file}: the piece {twice!r} occurs twice")
        backend = tokenizers.Tokenizer(
            models.WordPiece(vocabulary, unk_token=_BERT.unknown, max_input_chars_per_word=100)
        )
        backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        return cls._finish("bert", backend, _BERT, vocab_file)

    @classmethod
    def roberta(cls, vocab_file: str | Path, merges_file: str | Path) -> Self:
        """RoBERTa's byte-level tokenizer from `vocab.json` and `merges.txt` (no blank is put before the first
        word, as X-VLM uses it).

        Raises DataError when a file is missing or lacks a special token.
        """
        needed = "RoBERTa needs vocab.json and merges.txt"
        content, lines = _read(vocab_file, needed), _read(merges_file, needed).split("\n")
        pairs = (line.split(" ", 1) for line in lines if line.strip() and not line.startswith("#version"))
        try:
            merges = [(first, second) for first, second in pairs]
            backend = tokenizers.Tokenizer(models.BPE(vocab=json.loads(content), merges=merges))
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"{vocab_file} and {merges_file} are no vocabulary with its merges: {error}"
            ) from error
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return cls._finish("roberta", backend, _ROBERTA, vocab_file)

    @classmethod
    def _finish(
        cls,
        kind: Literal["bert", "roberta"],
        backend: tokenizers.Tokenizer,
        special: _Special,
        file: str | Path,
    ) -> Self:
        names = (special.cls, special.sep, special.pad, special.mask, special.unknown)
        ids: dict[str, Any] = {name: backend.token_to_id(name) for name in names}
        missing = [name for name, number in ids.items() if number is None]
        if missing:
            raise DataError(
                f"{file} lacks the special tokens {', '.join(missing)}; is it a {kind} vocabulary?"
            )
        strip = kind == "roberta"  # RoBERTa's <mask> takes the blank before it along
        backend.add_special_tokens(
            [tokenizers.AddedToken(n, special=True, lstrip=strip and n == special.mask) for n in names]
        )
        return cls(
            kind=kind,
            backend=backend,
            cls_id=ids[special.cls],
            sep_id=ids[special.sep],
            pad_id=ids[special.pad],
            mask_id=ids[special.mask],
            unknown_id=ids[special.unknown],
            vocabulary=backend.get_vocab_size(),
        )

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in ("backend", "_word_starts", "_ids")}
        return {**state, "backend": self.backend.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["backend"] = tokenizers.Tokenizer.from_str(state["backend"])

    @cached_property
    def _word_starts(self) -> list[bool]:
        """Per id: the piece begins a word."""
        starts = [True] * self.vocabulary
        special = self.backend.get_added_tokens_decoder()
        for piece, number in self.backend.get_vocab().items():
            if self.kind == "bert":
                starts[number] = not piece.startswith("##")
            else:
                starts[number] = (
                    number in special or piece[0] in "\u0120\u010a"
                )  # byte-level signs of blank and newline
        return starts

    def continues(self, ids: Sequence[int]) -> list[bool]:
        """Per id whether the piece goes on with the word before it.

        RoBERTa marks the beginnings of words instead, except the first word of a text, so the id after the
        leading special token begins a word whatever it looks like. (The official X-VLM has whole-word masking
        off for RoBERTa; specification 8.6.)
        """
        flags = [not self._word_starts[number] for number in ids]
        if self.kind == "roberta":
            for position in range(1, len(ids)):
                if ids[position - 1] == self.cls_id:
                    flags[position] = False
        return flags

    def tokens(self, text: str) -> list[str]:
        """Pieces of a text, without special tokens."""
        return self.backend.encode(text, add_special_tokens=False).tokens

    def token_ids(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def piece_ids(self, pieces: Sequence[str]) -> list[int]:
        """Ids of given pieces; the unknown token's for those the vocabulary lacks."""
        ids = (self.backend.token_to_id(piece) for piece in pieces)
        return [self.unknown_id if number is None else number for number in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def frame(self, ids: Sequence[int], *, max_tokens: int | None, separator: bool) -> list[int]:
        """[CLS] + ids (+ [SEP]), cut to `max_tokens` in all; the [SEP] is never cut off."""
        room = None if max_tokens is None else max_tokens - 1 - separator
        return [self.cls_id, *ids[:room], *([self.sep_id] if separator else [])]

    def pad(self, rows: Sequence[Sequence[int]], length: int | None = None) -> Encoded:
        """Rows of ids as tensors, padded to `length` or to the longest row."""
        length = max(map(len, rows), default=0) if length is None else length
        ids = torch.full((len(rows), length), self.pad_id)
        mask = torch.zeros((len(rows), length), dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[number, : len(row)] = 1
        return Encoded(ids, mask)

    def encode(
        self,
        texts: Sequence[str],
        *,
        max_tokens: int | None = None,
        separator: bool,
        pad: Literal["longest", "max"] = "longest",
    ) -> Encoded:
        """[CLS] + tokens of each text (+ [SEP]), cut to `max_tokens` (None: not cut) and padded. Texts are
        taken as they are.

        X-VLM encodes without separator except for captioning.
        """
        if pad == "max" and max_tokens is None:
            raise ValueError('pad="max" needs max_tokens')
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=False)
        rows = [self.frame(text.ids, max_tokens=max_tokens, separator=separator) for text in encoded]
        return self.pad(rows, max_tokens if pad == "max" else None)


def _read(file: str | Path, needed: str) -> str:
    try:
        return files.read(os.fspath(file)).decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"{file} not found; {needed}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}") from error


def _read_lines(file: str | Path) -> list[str]:
    text = _read(file, "BERT needs its vocab.txt")
    # Only "\n" ends a line: vocabularies hold characters that str.splitlines would take for line ends.
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


_caption = partial(pre_caption, empty="keep")  # `text_ids` reports empty texts itself


def text_ids(
    text: str,
    tokenizer: Tokenizer,
    options: TextOptions,
    *,
    clean: Callable[[str, int], str] = _caption,
    prompt: str = "",
) -> list[int]:
    """Clean, tokenise and frame one text. `prompt` is put before the cleaned text as it is, its own blank
    included. Raises BadSample ("empty text") for a text without a word."""
    if options.tokenized:
        ids = tokenizer.piece_ids(text.strip().split(" ")) if text.strip() else []
        start = tokenizer.token_ids(prompt.rstrip(" ")) if prompt else []
    else:
        cleaned = clean(text, options.max_words)
        ids, start = tokenizer.token_ids(prompt + cleaned) if cleaned.strip() else [], []
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
    out."""
    ids = text_ids(text, tokenizer, options)
    if isinstance(masking, IndependentMasking):
        draws = draw_independently(len(ids), masking, vocabulary=tokenizer.vocabulary, rng=rng)
        never = (tokenizer.cls_id, tokenizer.pad_id)
        return MaskedText(ids, *mask_independently(ids, draws, mask_id=tokenizer.mask_id, never=never))
    masked = mask_tokens(
        ids,
        tokenizer.continues(ids),
        masking,
        mask_id=tokenizer.mask_id,
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
