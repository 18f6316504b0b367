"""Clean-up of captions and questions. Imports nothing heavy.

Source: data specification 2; X-VLM specification 5.6 and 5.7 (dataset/utils.py).
"""

import re
from typing import Literal, TypeAlias

Clean: TypeAlias = Literal["caption", "question", "none"]
"""How a text is cleaned: `pre_caption`, `pre_question`, or not at all."""

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


def cleaned(text: str, how: Clean, max_words: int, *, empty: Literal["error", "keep"] = "error") -> str:
    """A text after the clean-up `how`, its first `max_words` words; "none" returns it as it is, whole.

    `empty` says what a caption without a word does (`pre_caption`).
    """
    if how == "caption":
        return pre_caption(text, max_words, empty=empty)
    return pre_question(text, max_words) if how == "question" else text


def names_a_side(text: str, *, whole_word: bool) -> bool:
    """Whether a text says left or right; without `whole_word` also inside another word ("bright"), the
    reference's test."""
    if whole_word:
        return re.search(r"\b(left|right)\b", text, re.IGNORECASE) is not None
    return "left" in text or "right" in text
