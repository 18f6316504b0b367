"""From the dependency parse of a caption to its concepts: the heads of its noun phrases with the nouns they
are compounded with.

A parse has spaCy's English scheme (coarse part of speech, dependency label, position of the head; the root is
its own head).
Source: SceneGraphParser 0.1.0, whose rules ViCHA uses, with its quirks under `legacy`; spaCy's definition of
base noun phrases.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vlp_data.errors import DataError

NOUNS = frozenset({"NOUN", "PROPN", "PRON"})
# Dependency labels of words that can head a noun phrase of their own.
NOMINAL = frozenset(
    {"oprd", "nsubj", "dobj", "nsubjpass", "pcomp", "pobj", "dative", "appos", "attr", "ROOT"}
)
PHRASAL_PREPOSITIONS = frozenset(
    {
        "in addition to",
        "in front of",
        "in reference to",
        "in regard to",
        "in spite of",
        "on account of",
        "on top of",
        "on side of",
        "on the side of",
        "with regard to",
    }
)


@dataclass(frozen=True, kw_only=True)
class Parse:
    """One parsed caption of n words. Raises DataError when the lengths differ or a head lies outside."""

    words: tuple[str, ...]
    pos: tuple[str, ...]
    """Coarse parts of speech: NOUN, VERB, ..."""
    heads: tuple[int, ...]
    """Position of every word's head."""
    deps: tuple[str, ...]
    """Dependency labels: nsubj, pobj, compound, ..."""

    def __post_init__(self) -> None:
        count = len(self.words)
        if not len(self.pos) == len(self.heads) == len(self.deps) == count:
            raise DataError(
                f"a parse needs as many pos, heads and deps as words; found {count} words, "
                f"{len(self.pos)} pos, "
                f"{len(self.heads)} heads, {len(self.deps)} deps"
            )
        if any(not 0 <= head < count for head in self.heads):
            raise DataError(f"the heads of {' '.join(self.words)!r} must lie in 0..{count - 1}: {self.heads}")

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Positions of every word's direct dependents, left to right."""
        found: list[list[int]] = [[] for _ in self.words]
        for word, head in enumerate(self.heads):
            if head != word:
                found[head].append(word)
        return tuple(map(tuple, found))

    def dependents(self, word: int, *labels: str) -> list[int]:
        """Direct dependents with one of the labels."""
        return [child for child in self.children[word] if self.deps[child] in labels]

    def chain(self, word: int, label: str) -> list[int]:
        """Dependents with the label, theirs with the same, and so on; in the order of the sentence."""
        found: list[int] = []
        waiting = [word]
        while waiting:
            reached = self.dependents(waiting.pop(), label)
            found += reached
            waiting += reached
        return sorted(found)

    @cached_property
    def first(self) -> tuple[int, ...]:
        """Leftmost word of everything that hangs on each word."""
        edges = list(range(len(self.words)))
        for word in edges.copy():
            above = word
            for _ in self.words:  # a cycle of heads, which no parser makes, must not hang
                if self.heads[above] == above:
                    break
                above = self.heads[above]
                edges[above] = min(edges[above], word)
        return tuple(edges)


def noun_phrases(parse: Parse) -> list[int]:
    """Heads of the base noun phrases, left to right; the phrase of head h is the words
    `parse.first[h]`..h."""
    heads: list[int] = []
    for word, (pos, label) in enumerate(zip(parse.pos, parse.deps, strict=True)):
        if pos not in NOUNS or (heads and parse.first[word] <= heads[-1]):
            continue
        if label == "conj":
            above = parse.heads[word]
            while parse.deps[above] == "conj" and parse.heads[above] < above:
                above = parse.heads[above]
            label = parse.deps[above]
        if label in NOMINAL:
            heads.append(word)
    return heads


def entities(parse: Parse, *, legacy: bool = False) -> list[int]:
    """Noun phrases that name something: those that are part of a phrasal preposition ("in front of") are left
    out, and pronouns.

    `legacy` keeps pronouns, as the parser does on spaCy 3.
    """
    phrases = noun_phrases(parse)
    hollow = {parse.heads[parse.heads[head]] for head in phrases if _follows_phrasal_preposition(parse, head)}
    return [head for head in phrases if head not in hollow and (legacy or parse.pos[head] != "PRON")]


def _follows_phrasal_preposition(parse: Parse, noun: int) -> bool:
    preposition = parse.heads[noun]
    middle = parse.heads[preposition]
    if parse.deps[noun] != "pobj" or parse.deps[middle] != "pobj" or parse.deps[preposition] == "agent":
        return False
    # The parser asks first whether the phrase says where a verb with a known subject takes place.
    if (parse.pos[middle] == "VERB" or parse.deps[middle] == "acl") and _has_subject(parse, middle):
        return False
    return " ".join(parse.words[parse.heads[middle] : preposition + 1]).lower() in PHRASAL_PREPOSITIONS


def _has_subject(parse: Parse, verb: int) -> bool:
    agents = (parse.dependents(by, "pobj") for by in parse.dependents(verb, "agent"))
    return (
        parse.deps[verb] == "acl"
        or bool(parse.dependents(verb, "nsubj"))
        or (parse.pos[verb] == "VERB" and any(agents))
    )


def concepts(parse: Parse, *, legacy: bool = False) -> list[str]:
    """Concepts of a caption as written there (neither lower-cased nor made singular), in its order.

    A concept is the head of a noun phrase with all nouns compounded with it, in the order of the sentence
    ("steel kitchen sink"). `legacy` gives what the released vocabularies were made with: pronouns are
    concepts, and each noun that hangs on the head directly is put in front of what is there, which swaps two
    of them ("kitchen steel sink").
    """
    found = []
    for head in entities(parse, legacy=legacy):
        before = parse.dependents(head, "compound")[::-1] if legacy else parse.chain(head, "compound")
        found.append(" ".join(parse.words[word] for word in (*before, head)))
    return found


def attributes(parse: Parse, *, legacy: bool = False) -> list[tuple[str, str]]:
    """(concept, adjective or number) of a caption. Words joined to an attribute count too; with `legacy` only
    the first of them."""
    found = []
    for head, concept in zip(entities(parse, legacy=legacy), concepts(parse, legacy=legacy), strict=True):
        for word in parse.dependents(head, "nummod", "amod"):
            joined = parse.dependents(word, "conj") if legacy else parse.chain(word, "conj")
            found += [(concept, parse.words[each]) for each in (word, *joined)]
    return found


def title(parse: Parse, caption: str, *, legacy: bool = False) -> str:
    """The concepts joined by "and"; the caption itself where there are none."""
    return " and ".join(concepts(parse, legacy=legacy)) or caption


def parse_of(entry: dict[str, Sequence]) -> Parse:
    """A parse from {words, pos, heads, deps}; other fields are passed over. Raises DataError."""
    missing = [name for name in ("words", "pos", "heads", "deps") if name not in entry]
    if missing:
        raise DataError(f"a parse needs words, pos, heads and deps; {', '.join(missing)} is missing")
    return Parse(**{name: tuple(entry[name]) for name in ("words", "pos", "heads", "deps")})
