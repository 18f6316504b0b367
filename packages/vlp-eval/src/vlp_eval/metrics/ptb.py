"""Penn Treebank tokens of captions without Java, as the COCO caption evaluation makes them before it counts n-grams.

The published evaluation calls the tokenizer of Stanford CoreNLP 3.4.1 (`PTBTokenizer -preserveLines -lowerCase`) and drops punctuation.
This is a lexer for the same language, written from the tokenizer's observed output: at each position every rule says how far it
reaches, what it looks at behind its token included, and the one that reaches farthest wins, the earlier one of equals. What it leaves
out are rules for texts that are no captions (SGML with attributes, Asian smileys, soft hyphens).

Source: behaviour of PTBTokenizer; pycocoevalcap 1.2 `tokenizer/ptbtokenizer.py` for the list of dropped tokens.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import zip_longest
from typing import NamedTuple

DROPPED = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
"""Tokens that count for nothing. Brackets are lower case when this list is applied, so -lrb- and its like stay: kept as published."""


def caption_tokens(texts: Sequence[str]) -> list[list[str]]:
    """Tokens that n-gram metrics count, of each caption: lower case, without the punctuation of `DROPPED`."""
    return [[token for token in tokens if token not in DROPPED] for tokens in tokenize(texts)]


def tokenize(texts: Sequence[str]) -> list[list[str]]:
    """All tokens of each text, lower case; line ends inside a text count as blanks.

    The texts are lines of one file to the published tokenizer, so the beginning of the next one decides whether a line that ends in a single
    letter and a full stop ends in an abbreviation; here as well.
    """
    lines = [_LINE_END.sub(" ", text) for text in texts]
    return [
        _line(line, f"{line}\n{after.lstrip()[:_LOOK_AHEAD]}\n")
        for line, after in zip_longest(lines, lines[1:], fillvalue="")
    ]


_LOOK_AHEAD = 12


def _line(line: str, text: str) -> list[str]:
    """Tokens of `text` up to the end of `line`, with which it begins."""
    tokens: list[str] = []
    place = 0
    while place < len(line):
        plain = _PLAIN.match(text, place)
        if plain:
            tokens.append(plain[1])
            place = plain.end()
            continue
        if text[place] in _BLANKS:
            place += 1
            continue
        token, place = _next(text, place)
        if token:
            tokens.append(token.lower())
    return tokens


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    """Group 1 is the token; what follows is looked at, counts for the length, and is left for the next token."""
    write: Callable[[str], str]


def _next(text: str, place: int) -> tuple[str, int]:
    best, farthest = None, place
    for rule in _rules():
        found = rule.pattern.match(text, place)
        if found and found.end() > farthest:
            best, farthest = (rule, found), found.end()
    if best is None:
        return "", place + 1  # the published tokenizer cannot read it either and leaves it out
    rule, found = best
    return rule.write(found[1]), found.end(1)


_LINE_END = re.compile(r"[\r\n\x0b\x0c\x85\u2028\u2029]")
_BLANKS = " \t\n\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u3000"
# A word of small letters before a blank, the ones that fall apart left to the rules: most of a caption.
_PLAIN = re.compile(r"(?!(?:cannot|gonna|gotta|lemme|gimme|wanna) )([a-z]+)(?= )")

_NO_LETTERS = r"_\u00b2\u00b3\u00b9\u00bc-\u00be\u2150-\u215f"  # signs that Python counts as part of words
_L = rf"(?:[^\W\d{_NO_LETTERS}]|[\u0300-\u036f])"  # a letter of any script, accents that stand alone included
_A = rf"(?:[^\W{_NO_LETTERS}]|[\u0300-\u036f])"  # a letter or digit
_APOS = r"(?:['\x92\u2019]|&apos;)"
_APOS_LIKE = r"(?:['\x92\u2019`\x91\u2018\u201b]|&apos;)"
_AUX = rf"{_APOS}(?:[msdMSD]|re|ve|ll)"
_NUMBER = r"(?:[0-9]*(?:[.:,][0-9]+)+|[0-9]+)"
_WORD = rf"{_L}{_A}*(?:[.!?]{_L}{_A}*)*"
_THING = rf"(?:[dDoOlL]{_APOS_LIKE}{_A})?{_A}+(?:[-_](?:[dDoOlL]{_APOS_LIKE}{_A})?{_A}+)*"
_PART = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_URL = r"[^ \t\n\"<>|()]"
_URL_END = r"[^ \t\n\"<>|.!?(){},-]"
_FILE = "bat|bmp|class|cgi|cpp|c|dll|docx?|exe|gif|gz|html?|h|jar|java|jpe?g|mov|mp[34g]|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|wav|xml|x|zip|avi|flv|mkv|wm[va]"

# Abbreviations that keep their full stop whatever follows.
_ABBREVIATION = (
    r"[Ee]tc|vs?|cf|[Aa]l|p|ft|[Mm]rs?|MRS?|[Mm]s|MS|[Dd]rs?|DR|[Ss]te?|STE?|[Mm]t|MT|[Aa]ve|[Ll]t|Lieut|[Cc]ol|[Gg]en|Messrs|[Gg]ovs?|Adm"
    r"|[Rr]ev|[Mm]aj|[Ss]gt|Cpl|Pvt|[Cc]apt|[Pp]res|[Hh]on|Brig|Co?mdr|Pfc|Spc|Supts?|Det|[Pp]rofs?|[Ss]ens?|[Rr]eps?|Attys?|[Dd]ept|Cie"
    r"|[Jj]r|JR|[Ss]r|SR|[Bb]ros|(?:Ed|Ph)\.D|[Bb]lvd|[Rr]d|RD|[Ee]sq|[Ii]nc|INC|[Cc]os?|[Cc]orp|CORP|[Ll]td|LTD|[Pp]lc|Rt|Bancorp|Bhd|Assn"
    r"|[Uu]niv|[Ii]ntl|Sys|[Pp]t[ye]s?|[Jj]an|[Ff]eb|[Mm]ar|[Aa]pr|[Jj]une?|[Jj]uly?|[Aa]ug|[Ss]ept?|[Oo]ct|[Nn]ov|[Dd]ec|[Mm]on|[Tt]ues?|[Ww]ed"
    r"|[Tt]hu(?:rs)?|[Ff]ri|[Bb]ldg|[Tt]el|[Ee]st|[Ee]xt|[Ss]q|Ala|Ariz|Ark|Calif|Colo|Conn|Ct|Dak|Del|Fla|Ga|Ill|Ind|Kans?|Ky|La|Mass|Md|Mich"
    r"|Minn|Miss|Mo|Mont|Neb|Nev|Okla|Ore|Penna?|Pa|Tenn|Tex|Va|Vt|Wash|Wisc?|Wyo"
)
# These only before a number.
_BEFORE_NUMBER = "[Nn]os?|[Ff]igs?|pp|op|[Cc]a|[Aa]rt|[Pp]rop"

# A full stop after a single letter ends a sentence before these, else it makes an abbreviation.
_SENTENCE_START = (
    r"(?:A|About|According|After|An|As|At|But|Her?|Here|However|If|In|It|Last|Many|M[rs]\.|Now|Once|One|Other|Our|She|Since|So|Some|Such"
    r"|That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You)(?!\w)"
)

_FRACTIONS = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
_BRACKETS = {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}
_SIGNS = {
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "\u00a3": "#",
    "\u20ac": "$",
    "\u00a2": "cents",
    "\u2026": "...",
}
_QUOTES: dict[str, str] = {
    **dict.fromkeys("\u201c\u00ab", "``"),
    **dict.fromkeys('\u201d\u00bb"', "''"),
    **dict.fromkeys("\u2018\x91\u201b\u2039", "`"),
    **dict.fromkeys("\u2019\x92\u203a", "'"),
}


@cache
def _rules() -> tuple[_Rule, ...]:
    """The lexer's rules, in the order that decides between matches of one length; compiled at first use."""

    def rule(pattern: str, *, behind: str = "", write: Callable[[str], str] = _as_it_is) -> _Rule:
        return _Rule(re.compile(f"({pattern}){behind}"), write)

    return (
        rule(
            r"<(?:[!?][A-Za-z-][^>]*|/?[A-Za-z][A-Za-z0-9_:.-]*(?: +[A-Za-z][A-Za-z0-9_:.-]*)* */?)>",
            write=_joined,
        ),
        rule(r"-{2,4}|&(?:mdash|ndash);|[\x96\x97\u2013\u2014\u2015]", write=lambda _: "--"),
        rule(r"-{5,}|_+|-(?:[LlRr][RrCcSs][Bb])-"),
        rule("&(?:amp|lt|gt);|[\u00a3\u20ac\u00a2\u2026]", write=lambda sign: _SIGNS[sign]),
        *(
            rule(first, behind=f"{second}(?!{_A})")
            for first, second in (
                ("[Cc]an", "not"),
                ("[Gg]on", "na"),
                ("[Gg]ot", "ta"),
                ("[Ll]em", "me"),
                ("[Gg]im", "me"),
                ("[Ww]an", "na"),
            )
        ),
        rule(f"{_APOS}[Tt]", behind="(?:is|was|IS|WAS)(?![A-Za-z])", write=_straight),
        rule("[A-Za-z]*[A-MO-Za-mo-z]", behind=f"[nN]{_APOS_LIKE}[tT]"),
        rule(f"[nN]{_APOS_LIKE}[tT]", behind="[^A-Za-z]", write=_straight),
        rule(_WORD, behind=_AUX),
        rule(_WORD),
        rule(rf"https?://{_URL}+{_URL_END}"),
        rule(
            rf"(?:www\.(?:[^ \t\n\"<>|.!?()\u007b\u007d,]+\.)+[a-zA-Z]{{2,4}}|(?:[^ \t\n\"`'<>|.!?()\u007b\u007d,_$-]+\.)+(?:com|net|org|edu))(?:/{_URL}+{_URL_END})?"
        ),
        rule(
            r"[a-zA-Z0-9][^ \t\n\"<>|()\u00a0]*@(?:[^ \t\n\"<>|()\u007b\u007d.\u00a0]+\.)*[^ \t\n\"<>|()\u007b\u007d.\u00a0]+"
        ),
        rule("@[A-Za-z][A-Za-z0-9_]*|#[A-Za-z][A-Za-z_]*"),
        rule(f"{_AUX}", behind="[^A-Za-z]", write=_straight),
        rule("[0-9]{1,2}[-/][0-9]{1,2}[-/][0-9]{2,4}"),
        rule(rf"[-+]?{_NUMBER}"),
        rule(r"(?:[0-9]{1,4}[- \u00a0])?[0-9]{1,4}[/\u2044][0-9]{1,4}", write=_joined),
        rule("[\u00bc-\u00be\u2153-\u215e]", write=lambda sign: _FRACTIONS.get(sign, sign)),
        rule(
            f"{_APOS}n{_APOS}?|[lLdDjJ]{_APOS}|[Oo]l{_APOS}|{_APOS}(?:em|till?|cause|[2-9]0s)",
            write=_straight,
        ),
        rule(f"{_APOS}[0-9][0-9]", behind="[ \t\n]"),
        rule(f"[yY]{_APOS}", behind=_L, write=_straight),
        rule(
            f"[A-HJ-XZn]{_APOS_LIKE}{_L}{_L}+|{_L}+[aeiouyAEIOUY]{_APOS_LIKE}[aeiouA-Z]{_L}*", write=_straight
        ),
        rule(_THING, behind=_AUX),
        rule(_THING, write=_straight),
        rule("[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+", behind=_AUX),
        rule("[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"),
        rule(rf"{_PART}(?:/{_PART}){{1,2}}"),
        rule(rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:(?:[A-Za-z]\.){(2,)}|[A-Za-z0-9]+))+"),
        rule(r"[Cc]\+\+|[CcFf]#"),
        rule(rf"(?:{_A}+[-._])*{_A}+\.(?:{_FILE})(?!{_A})"),
        rule(rf"(?:{_ABBREVIATION})\."),
        rule(r"[A-Za-z](?:\.[A-Za-z])+\."),
        rule(rf"[A-Za-z]\.(?!\s+{_SENTENCE_START})"),
        rule(rf"(?:{_BEFORE_NUMBER})\.", behind=r"[ \u00a0]*[0-9]"),
        rule(rf"(?:{_WORD}|{_THING}|{_NUMBER})\.", behind="[,;:]"),
        rule(
            "(?:\\([0-9]{2,3}\\)[ \u00a0]?|(?:\\+\\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])[0-9]{3,4}[- \u00a0]?[0-9]{3,5}",
            write=lambda token: _joined(_bracketed(token)),
        ),
        rule(r"[<>]?[:;=][-o*']?[()DPdpO\\\u007b@|\[\]]", behind="[^A-Za-z0-9]", write=_bracketed),
        rule(r"[\^x=~<>'-]_[\^x=~<>'-]"),
        rule(r"[?!]+"),
        rule(r"\.{3,5}|(?:\. ){2,3}\.", write=lambda _: "..."),
        rule(r"[A-Z]*\$"),
        rule("'", behind=r"[A-Za-z][^ \t\n]", write=lambda _: "`"),
        rule("''|``"),
        rule(
            '["\u201c\u201d\u00ab\u00bb\u2018\u2019\x91\x92\u201b\u2039\u203a]',
            write=lambda quote: _QUOTES[quote],
        ),
        rule(r"[()\[\]\u007b\u007d]", write=_bracketed),
        rule(r"<<|>>|\*+"),
        rule("[^\u2010\ud800-\udfff\U00010000-\U0010ffff]"),
    )


def _as_it_is(token: str) -> str:
    return token


def _straight(token: str) -> str:
    return re.sub(r"['\x92\u2019\u2018\x91\u201b]|&apos;", "'", token)


def _bracketed(token: str) -> str:
    return "".join(_BRACKETS.get(letter, letter) for letter in token)


def _joined(token: str) -> str:
    """One token although there is a blank inside."""
    return token.replace(" ", "\u00a0")
