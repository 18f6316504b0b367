"""Tokenizers: text to ids.

Source: data specification 2; X-VLM specification 5.7 (dataset/tokenization); memory CLIP specification 5.6.
"""

import gzip
import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from vlp_data import files
from vlp_data.errors import DataError
from vlp_data.schema import whole

TokenizerKind = Literal["wordpiece", "roberta", "clip", "words", "file"]


class Encoded(NamedTuple):
    """ids [B, L] int64 and attention_mask [B, L] int64 (1 = token)."""

    ids: Tensor
    attention_mask: Tensor


class Special(NamedTuple):
    """Special tokens by name; "" where a tokenizer has none."""

    start: str
    end: str
    pad: str
    mask: str
    unknown: str


_BERT = Special(start="[CLS]", end="[SEP]", pad="[PAD]", mask="[MASK]", unknown="[UNK]")
_ROBERTA = Special(start="<s>", end="</s>", pad="<pad>", mask="<mask>", unknown="<unk>")
_WORDS = Special(start="<start>", end="<end>", pad="<pad>", mask="", unknown="<unk>")
CLIP_WORDS = ("<start_of_text>", "<end_of_text>")
"""How open_clip writes CLIP's special tokens; OpenAI and Long-CLIP: <|startoftext|> and <|endoftext|>."""
_CLIP_MERGES = 49152 - 256 - 2
"""Merges of OpenAI's file that are in use; it holds more."""
_CLIP_PIECES = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

Where = Literal["inner", "first", "last", "whole", "unknown"]


class Mark(NamedTuple):
    """How a vocabulary marks words: a sign before `inner` pieces, before the `first` piece, after the `last`
    piece; or every piece is a `whole` word; or in a way that is not known."""

    where: Where
    signs: tuple[str, ...] = ()


_BYTE_LEVEL = Mark("first", ("\u0120", "\u010a"))
"""Byte-level signs of blank and newline."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to ids; picklable. Made by `wordpiece`, `roberta`, `clip`, `words` or `file`, which say what each
    kind can: all have a start token and padding, but not all can mask (`can_mask`) or end a text
    (`can_end`)."""

    kind: TokenizerKind
    backend: tokenizers.Tokenizer = field(repr=False)
    cls_id: int
    """Starts a text."""
    end: int | None
    """Ends a text; `sep_id` refuses where there is none."""
    pad_id: int
    mask_id: int | None
    """Stands for a masked token; None where the vocabulary has none."""
    unknown_id: int | None
    """Stands for what the vocabulary lacks; None where it can spell anything."""
    vocabulary: int
    """Number of ids."""
    mark: Mark
    mend: bool = False
    """Texts are mended by ftfy (CLIP)."""

    # ------------------------------------------------------------------------------------------ kinds

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
        return cls._finish("wordpiece", backend, _BERT, vocab_file, mark=Mark("inner", ("##",)))

    @classmethod
    def roberta(cls, vocab_file: str | Path, merges_file: str | Path) -> Self:
        """RoBERTa's byte-level tokenizer from `vocab.json` and `merges.txt` (no blank is put before the first
        word, as X-VLM uses it).

        Raises DataError when a file is missing or lacks a special token.
        """
        backend = _byte_pairs(vocab_file, merges_file, needed="RoBERTa needs vocab.json and merges.txt")
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return cls._finish("roberta", backend, _ROBERTA, vocab_file, mark=_BYTE_LEVEL)

    @classmethod
    def clip(cls, *vocabulary: str | Path, special: tuple[str, str] | None = None, mend: bool = True) -> Self:
        """CLIP's byte-pair tokenizer, from OpenAI's `bpe_simple_vocab_16e6.txt.gz`, or from `vocab.json` and
        `merges.txt`. Ids are padded with 0.

        Texts are cleaned as open_clip does: mended by the library ftfy, HTML entities resolved, runs of white
        space to one blank, lower case. `mend=False` does without ftfy. `special` are the two words for start
        and end of a text, as they may stand in a text; None: those of `vocab.json`, or `CLIP_WORDS`. The
        attention mask of `encode` is 1 on start, words and end.

        Raises DataError when a file is missing or is no such vocabulary, and when ftfy is missing.
        """
        if mend:
            _ftfy()
        if len(vocabulary) == 1:
            backend, (start, end) = _clip_merges(vocabulary[0]), special or CLIP_WORDS
            backend.add_special_tokens([tokenizers.AddedToken(word, special=True) for word in (start, end)])
        else:
            backend = _byte_pairs(*vocabulary, needed="CLIP needs vocab.json and merges.txt", suffix="</w>")
            start, end = special or ("<|startoftext|>", "<|endoftext|>")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_CLIP_PIECES), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        names = Special(start=start, end=end, pad="", mask="", unknown="")
        mark = Mark("last", ("</w>",))
        return cls._finish("clip", backend, names, vocabulary[0], mark=mark, pad_id=0, mend=mend)

    @classmethod
    def words(cls, word_map: str | Path) -> Self:
        """Whole words from a word map, {word: id} with <start>, <end>, <unk> and <pad>, as ViSFT's captions
        have it. Words are what stands between blanks, as they are written.

        Raises DataError when the file is missing or is no word map.
        """
        vocabulary = _vocabulary(word_map, "captions of words need their word map")
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=_WORDS.unknown))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return cls._finish("words", backend, _WORDS, word_map, mark=Mark("whole"))

    @classmethod
    def file(cls, file: str | Path, *, special: Special) -> Self:
        """Any `tokenizer.json` of the tokenizers library. `special` names its special tokens; start and pad
        must be among them. What the file itself says of framing, padding and cutting is left out.

        Raises DataError when the file is missing, is no tokenizer or lacks a token.
        """
        content = _read(file, "it should be a tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{file} is no tokenizer.json: {error}") from error
        backend.no_padding()
        backend.no_truncation()
        return cls._finish("file", backend, special, file, mark=_mark(json.loads(content)))

    @classmethod
    def _finish(
        cls,
        kind: TokenizerKind,
        backend: tokenizers.Tokenizer,
        special: Special,
        file: str | Path,
        *,
        mark: Mark,
        pad_id: int | None = None,
        mend: bool = False,
    ) -> Self:
        ids: dict[str, Any] = {name: backend.token_to_id(name) for name in special if name}
        missing = [name for name, number in ids.items() if number is None]
        if missing:
            raise DataError(
                f"{file} lacks the special tokens {', '.join(missing)}; is it a {kind} vocabulary?"
            )
        strip = kind == "roberta"  # RoBERTa's <mask> takes the blank before it along
        backend.add_special_tokens(
            [tokenizers.AddedToken(n, special=True, lstrip=strip and n == special.mask) for n in ids]
        )
        return cls(
            kind=kind,
            backend=backend,
            cls_id=ids[special.start],
            end=ids.get(special.end),
            pad_id=ids[special.pad] if pad_id is None else pad_id,
            mask_id=ids.get(special.mask),
            unknown_id=ids.get(special.unknown),
            vocabulary=backend.get_vocab_size(),
            mark=mark,
            mend=mend,
        )

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in ("backend", "_joins")}
        return {**state, "backend": self.backend.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["backend"] = tokenizers.Tokenizer.from_str(state["backend"])

    # --------------------------------------------------------------------------------- what it can

    @property
    def can_mask(self) -> bool:
        """Whether there is a mask token."""
        return self.mask_id is not None

    @property
    def can_end(self) -> bool:
        """Whether there is a token that ends a text."""
        return self.end is not None

    @property
    def sep_id(self) -> int:
        """Ends a text. Raises DataError where there is no such token."""
        if self.end is None:
            raise DataError(
                f"this tokenizer of kind {self.kind} has no token that ends a text; "
                "name one (special.end), or take another tokenizer"
            )
        return self.end

    def require_mask(self) -> int:
        """The id of the mask token. Raises DataError where there is none."""
        if self.mask_id is None:
            raise DataError(
                f"a tokenizer of kind {self.kind} has no mask token, which masked language modelling needs; "
                "take one that has (wordpiece, roberta, or file with special.mask)"
            )
        return self.mask_id

    # ------------------------------------------------------------------------------ text to ids and back

    @cached_property
    def _joins(self) -> list[bool]:
        """Per id: a piece that goes on with the word before it (`inner`, `first`), or that the next one goes
        on with (`last`)."""
        special = self.backend.get_added_tokens_decoder()
        joins = [False] * self.vocabulary
        where, signs = self.mark
        for piece, number in self.backend.get_vocab().items():
            if number in special:
                continue
            match where:
                case "inner":
                    joins[number] = piece.startswith(signs)
                case "first":
                    joins[number] = not piece.startswith(signs)
                case "last":
                    joins[number] = not piece.endswith(signs)
                case "whole":
                    pass
                case "unknown":
                    raise DataError(
                        "how this tokenizer.json marks words is not known, so whole words cannot be told; "
                        "masking takes whole_words=false"
                    )
        return joins

    def continues(self, ids: Sequence[int]) -> list[bool]:
        """Per id whether the piece goes on with the word before it.

        RoBERTa marks the beginnings of words, except the first word of a text, so the id after the start
        token begins a word whatever it looks like. (The official X-VLM has whole-word masking off for
        RoBERTa; specification 8.6.) CLIP marks the ends of words.
        """
        if self.mark.where == "last":
            return [position > 0 and self._joins[ids[position - 1]] for position in range(len(ids))]
        flags = [self._joins[number] for number in ids]
        if self.mark.where == "first":
            for position in range(1, len(ids)):
                if ids[position - 1] == self.cls_id:
                    flags[position] = False
        return flags

    def _prepared(self, text: str) -> str:
        text = whole(text)
        if self.kind != "clip":
            return text
        if self.mend:
            text = _ftfy().fix_text(text)
        return " ".join(html.unescape(html.unescape(text)).split()).lower()

    def tokens(self, text: str) -> list[str]:
        """Pieces of a text, without special tokens."""
        return self.backend.encode(self._prepared(text), add_special_tokens=False).tokens

    def token_ids(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self.backend.encode(self._prepared(text), add_special_tokens=False).ids

    def piece_ids(self, pieces: Sequence[str]) -> list[int]:
        """Ids of given pieces; the unknown token's for those the vocabulary lacks. Raises DataError for such
        a piece where there is no unknown token."""
        ids = [self.backend.token_to_id(whole(piece)) for piece in pieces]
        if self.unknown_id is None and None in ids:
            raise DataError(f"the vocabulary lacks the piece {pieces[ids.index(None)]!r}")
        return [self.unknown_id if number is None else number for number in ids]  # type: ignore[misc]  # see above

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        text = self.backend.decode(list(ids), skip_special_tokens=True)
        return text.replace("</w>", " ").rstrip(" ") if self.kind == "clip" else text

    def frame(self, ids: Sequence[int], *, max_tokens: int | None, separator: bool) -> list[int]:
        """Start + ids (+ end), cut to `max_tokens` in all; the end is never cut off."""
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
        """Start + tokens of each text (+ end), cut to `max_tokens` (None: not cut) and padded. Texts are
        taken as they are, CLIP's with its own clean-up.

        X-VLM encodes without separator except for captioning.
        """
        if pad == "max" and max_tokens is None:
            raise ValueError('pad="max" needs max_tokens')
        encoded = self.backend.encode_batch(
            [self._prepared(text) for text in texts], add_special_tokens=False
        )
        rows = [self.frame(text.ids, max_tokens=max_tokens, separator=separator) for text in encoded]
        return self.pad(rows, max_tokens if pad == "max" else None)


# ------------------------------------------------------------------------------------------------ files


def _read_bytes(file: str | Path, needed: str) -> bytes:
    try:
        data = files.read(os.fspath(file))
        return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except FileNotFoundError:
        raise DataError(f"{file} not found; {needed}") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _read(file: str | Path, needed: str) -> str:
    try:
        return _read_bytes(file, needed).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}") from error


def _read_lines(file: str | Path) -> list[str]:
    text = _read(file, "BERT needs its vocab.txt")
    # Only "\n" ends a line: vocabularies hold characters that str.splitlines would take for line ends.
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


def _vocabulary(file: str | Path, needed: str) -> dict[str, int]:
    try:
        content = json.loads(_read(file, needed))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict) or not all(type(number) is int for number in content.values()):
        raise DataError(f"{file} is no word map: it must be one object of words with their numbers")
    if len(set(content.values())) != len(content):
        raise DataError(f"{file} gives two words the same number")
    return content


def _byte_pairs(
    vocab_file: str | Path, merges_file: str | Path, *, needed: str, suffix: str | None = None
) -> tokenizers.Tokenizer:
    content, lines = _read(vocab_file, needed), _read(merges_file, needed).split("\n")
    pairs = (line.split(" ", 1) for line in lines if line.strip() and not line.startswith("#version"))
    try:
        merges = [(first, second) for first, second in pairs]
        ends = {} if suffix is None else {"end_of_word_suffix": suffix}
        return tokenizers.Tokenizer(models.BPE(vocab=json.loads(content), merges=merges, **ends))
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            f"{vocab_file} and {merges_file} are no vocabulary with its merges: {error}"
        ) from error


def _clip_merges(file: str | Path) -> tokenizers.Tokenizer:
    """Byte units, the same as ends of words, merges; in this order the numbers are CLIP's."""
    lines = _read(file, "CLIP needs its bpe_simple_vocab_16e6.txt.gz").split("\n")
    pairs = [line.split() for line in lines[1 : _CLIP_MERGES + 1] if line]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise DataError(f"{file} holds no merges; CLIP needs its bpe_simple_vocab_16e6.txt.gz")
    merges, units = [(first, second) for first, second in pairs], _byte_units()
    pieces = [*units, *(unit + "</w>" for unit in units), *("".join(pair) for pair in merges)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{file} holds no merges of CLIP: {error}") from error


def _byte_units() -> list[str]:
    """The characters that stand for the 256 bytes: visible ones for themselves and first, then the others in
    their order as the characters from 256 on (the byte-level alphabet of GPT-2)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = sorted(set(range(256)) - set(visible))
    return [chr(byte) for byte in visible] + [chr(256 + place) for place in range(len(hidden))]


def _ftfy() -> Any:
    try:
        import ftfy
    except ImportError:
        raise DataError(
            "CLIP's texts are mended by the library ftfy, which is not installed: "
            "`pip install 'vlp-data[clip]'`, or mend=false to do without it (ids then differ for texts with "
            "damaged characters)"
        ) from None
    return ftfy


def _mark(content: Any) -> Mark:
    """How a tokenizer.json marks words."""
    model = content.get("model") or {}
    if model.get("type") == "WordPiece":
        return Mark("inner", (model.get("continuing_subword_prefix") or "##",))
    if model.get("type") == "WordLevel":
        return Mark("whole")
    if suffix := model.get("end_of_word_suffix"):
        return Mark("last", (suffix,))
    parts = [content.get("pre_tokenizer") or {}]
    parts += parts[0].get("pretokenizers") or []
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        return _BYTE_LEVEL
    if "Metaspace" in kinds:
        return Mark("first", ("\u2581",))
    return Mark("unknown")
