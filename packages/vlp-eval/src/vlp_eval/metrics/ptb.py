"""Tokens of captions by the conventions of the Penn Treebank, for BLEU, ROUGE-L and CIDEr.

The rules are our own, written for captions: split at blanks, peel the signs off both ends of each chunk,
split what is left at the signs inside it, then cut clitics. n't and 's are words, hyphenated words stay
whole, brackets become -lrb-.

Published numbers come from another program, Stanford's `PTBTokenizer` 3.4.1 as pycocoevalcap calls it. The
tokens here equal its tokens on the reference strings of the tests, and may differ on others: rarely in
captions (bird's-eye, abbreviations), more often in text that is no caption (addresses, smileys, tables). For
exactly the published tokens run `pycocoevalcap.tokenizer.ptbtokenizer.PTBTokenizer` (Java and the extra
`vlp-eval[caption-java]`) and give the words to `bleu`, `rouge_l` and `cider_d` of
`vlp_eval.metrics.captioning`.
"""

import html
import re
from collections.abc import Sequence
from itertools import zip_longest

DROPPED = frozenset(
    ("-LRB-", "-RRB-", "-LCB-", "-RCB-", "``", "''", "`", "'", "--", "-", "...", ".", ",", ";", ":", "?", "!")
)
"""Tokens that the metrics leave out. Tokens are lower case, so brackets (-lrb-) are counted, as pycocoevalcap
does."""

# Words of captions ("sun.", "sat.", "in.") are no abbreviations here: their full stop ends a sentence.
_TITLES = "capt col dr gen gov jr lt maj mr mrs ms prof rev sen sgt sr"
_DATES = "apr aug dec feb fri jan jul jun mar mon nov oct sep sept thu thurs tue tues"
_NAMES = "ave blvd bros co corp dept hwy inc ltd mt rd st"
_ABBREVIATIONS = frozenset(f"{_TITLES} {_DATES} {_NAMES} etc vs".split())

_TWO_WORDS: tuple[str, ...] = (
    "'t is",
    "'t was",
    "can not",
    "gim me",
    "gon na",
    "got ta",
    "lem me",
    "wan na",
    "y' all",
)
_JOINED = {words.replace(" ", ""): words.split() for words in _TWO_WORDS}

_PLAIN = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "--",
        "\u2014": "--",
        "\u2026": "...",
    }
)
_OPENING = {'"': "``", "''": "``", "'": "`"}
_CLOSING = {'"': "''"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

_ENTITY = re.compile(r"&#?\w+;")
# Blanks are missing in grass.The, 10:30pm and rock'n'roll, but not in flickr.com, U.S. and 10am.
_MISSING_BLANK = re.compile(
    r"(?<=[a-z]{2}\.)(?=[A-Z][a-z])|(?<=\d:\d\d)(?=[apAP]\.?[mM]\b)|(?<=\w)(?='[nN]'\w)|(?<=\w'[nN]')(?=\w)"
)
_DOTS, _DASH = re.compile(r"\.{2,}"), re.compile(r"-{2,}")
_MIXED_NUMBER = re.compile(r"(?<!\S)(\d{1,3}) (?=\d+/\d+(?![\d/]))")

_SIGN = re.compile(r"\.\.\.|--|[?!]+|''|``|[^\w\s]")
# Signs that join parts of a word (hyphen, apostrophe, slash, full stop) do not split it, nor do commas and
# colons between digits.
_SIGN_INSIDE = re.compile(r"(\.\.\.|--|[?!]+|''|(?<!\d)[,:](?!//)|[,:](?!\d|//)|[^\w\s'.,:/&@#+-])")
# Parts of a word in front of it: those of 's and '90s, #tag, @name, -3 and .5.
_HEAD = re.compile(r"^(?:(?!'(?:d|em|ll|m|re|s|til|tis|twas|ve|\d\ds?)\b|[#@][^\W\d]|[-+]?\.?\d)[^\w\s])+")
_TAIL = re.compile(r"[^\w\s]+$")
# The 'n' of rock 'n' roll, a smiley, a mark such as <unk>; and the signs behind it.
_WHOLE = re.compile(r"('n'|[:;]-?[()]|<\w+>)([^\w\s]*)")
_INITIALS = re.compile(r"[a-z]{1,2}(?:\.[a-z])+")
_CLITIC = re.compile(r"(.*\w)(n't|'(?:d|ll|m|re|s|ve))")


def caption_tokens(texts: Sequence[str]) -> list[list[str]]:
    """Tokens that n-gram metrics count, of each caption: lower case, without the punctuation of `DROPPED`."""
    return [[token for token in row if token not in DROPPED] for row in tokenize(texts)]


def tokenize(texts: Sequence[str]) -> list[list[str]]:
    """All tokens of each text, lower case; line ends inside a text count as blanks."""
    return [_tokens(text) for text in texts]


def _tokens(text: str) -> list[str]:
    found: list[str] = []
    chunks = _chunks(text)
    for chunk, following in zip_longest(chunks, chunks[1:], fillvalue=""):
        head, words, tail = _peeled(chunk.lower(), following)
        found += [_OPENING.get(sign, sign) for sign in _SIGN.findall(head)]
        found += words
        found += [_CLOSING.get(sign, sign) for sign in _SIGN.findall(tail)]
    return [_named(token) for token in found]


def _chunks(text: str) -> list[str]:
    text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text).translate(_PLAIN)
    text = _DASH.sub("--", _DOTS.sub("...", text))
    text = " ".join(_MISSING_BLANK.sub(" ", text).split())
    # The published tokenizer makes one token of 1 1/2, with a no-break space.
    return _MIXED_NUMBER.sub("\\1\u00a0", text).split(" ") if text else []


def _peeled(chunk: str, following: str) -> tuple[str, list[str], str]:
    """Signs in front, words (with signs that stand inside the chunk) and signs behind."""
    if whole := _WHOLE.fullmatch(chunk):
        return "", [whole[1]], whole[2]
    rest = _HEAD.sub("", chunk)
    body = _TAIL.sub("", rest)
    head, tail = chunk.removesuffix(rest), rest.removeprefix(body)
    if tail.startswith(".") and not tail.startswith("...") and _abbreviated(body, following):
        body, tail = body + ".", tail[1:]
    parts = _SIGN_INSIDE.split(body)
    return head, [word for part in parts for word in _words(_CLOSING.get(part, part))], tail


def _abbreviated(word: str, following: str) -> bool:
    """Whether the full stop behind a word is a part of it: St., p.m., the initial of J. Smith, the No. of No.
    5."""
    if word == "no":
        return following[:1].isdigit()
    if len(word) == 1:
        return word.isalpha() and following[:1].isupper()
    return word in _ABBREVIATIONS or _INITIALS.fullmatch(word) is not None


def _words(word: str) -> list[str]:
    if word in _JOINED:
        return _JOINED[word]
    if clitic := _CLITIC.fullmatch(word):
        return [*_words(clitic[1]), clitic[2]]
    return [word] if word else []


def _named(token: str) -> str:
    return "".join(_BRACKETS.get(letter, letter) for letter in token)
