"""Caption metrics of the COCO evaluation in Python: BLEU, ROUGE-L, CIDEr-D; and the reward of self-critical
training.

All take tokens (`vlp_eval.metrics.ptb.caption_tokens`), a caption as a list of words. `scores` runs the whole
pipeline from texts. METEOR and SPICE need Java programs: `vlp_eval.metrics.java`.

CIDEr and BLEU are numbers of a set, no means over its parts: CIDEr weighs words by how many images of the
evaluated set mention them, and BLEU divides sums over the corpus.

Sources: BLEU, Papineni et al. 2002; ROUGE-L, Lin 2004; CIDEr-D, arXiv 1411.5726; constants and reductions as
pycocoevalcap 1.2; X-VLM `utils/cider` for the cached document frequencies.
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, TypeVar

from vlp_eval.metrics import same_ids
from vlp_eval.metrics.ptb import caption_tokens

Id = TypeVar("Id", bound=Hashable)
Words: TypeAlias = Sequence[str]
Gram: TypeAlias = tuple[str, ...]

ORDERS = 4
"""Longest n-gram of BLEU and CIDEr."""
BETA = 1.2
"""Weight of recall against precision in ROUGE-L."""
SIGMA = 6.0
"""Width of CIDEr-D's penalty for another length."""
# BLEU's guards against division by zero; visible in the numbers of single short captions.
_TINY, _SMALL = 1e-15, 1e-9


class Corpus(NamedTuple):
    """A number of the whole set, and one per caption in order."""

    value: float
    each: list[float]


def tokenized(texts: Mapping[Id, Sequence[str]]) -> dict[Id, list[list[str]]]:
    """Tokens of each text of each id."""
    return {one: caption_tokens(own) for one, own in texts.items()}


def scores(
    captions: Mapping[Id, str], references: Mapping[Id, Sequence[str]]
) -> tuple[dict[str, float], dict[Id, dict[str, float]]]:
    """All metrics of captions against their references, as texts: (of the set, of each id in order of the
    references).

    bleu_1 to bleu_4, rouge_l, cider as fractions (papers print them times 100). Raises ValueError when the
    ids differ: CIDEr depends on the evaluated set.
    """
    same_ids(captions, references, "captions", "referenced images")
    ids = list(references)
    guess = [own[0] for own in tokenized({one: [captions[one]] for one in ids}).values()]
    truth = list(tokenized(references).values())
    found = {f"bleu_{n}": corpus for n, corpus in enumerate(bleu(guess, truth), start=1)}
    found |= {"rouge_l": rouge_l(guess, truth), "cider": cider_d(guess, truth)}
    each = {one: {name: corpus.each[row] for name, corpus in found.items()} for row, one in enumerate(ids)}
    return {name: corpus.value for name, corpus in found.items()}, each


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[Corpus]:
    """BLEU of orders 1 to 4.

    n-gram matches are clipped at the largest count of one reference. The length compared with is the
    reference's nearest to the caption's (the shorter of two equally near ones), or the mean of all where the
    set is a single caption.
    """
    _rows(captions, references)
    each: list[list[float]] = [[] for _ in range(ORDERS)]
    all_correct, all_guess, all_length, all_reference = [0] * ORDERS, [0] * ORDERS, 0, 0.0
    for words, own in zip(captions, references, strict=True):
        grams = ngrams(words)
        limit: Counter[Gram] = Counter()
        for reference in own:
            limit |= ngrams(reference)
        correct, guess = [0] * ORDERS, [max(0, len(words) - n) for n in range(ORDERS)]
        for gram, count in grams.items():
            correct[len(gram) - 1] += min(count, limit[gram])
        nearest: float = min((abs(len(one) - len(words)), len(one)) for one in own)[1]
        if len(captions) == 1:
            nearest = sum(len(one) for one in own) / len(own)
        for n, value in enumerate(_bleu(correct, guess, len(words), nearest)):
            each[n].append(value)
        all_correct = [a + b for a, b in zip(all_correct, correct, strict=True)]
        all_guess = [a + b for a, b in zip(all_guess, guess, strict=True)]
        all_length, all_reference = all_length + len(words), all_reference + nearest
    total = _bleu(all_correct, all_guess, all_length, all_reference)
    return [Corpus(value, values) for value, values in zip(total, each, strict=True)]


def _bleu(correct: Sequence[int], guess: Sequence[int], length: float, reference: float) -> list[float]:
    ratio = (length + _TINY) / (reference + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, values = 1.0, []
    for n, (right, all_) in enumerate(zip(correct, guess, strict=True), start=1):
        product *= (right + _TINY) / (all_ + _SMALL)
        values.append(product ** (1 / n) * penalty)
    return values


def rouge_l(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> Corpus:
    """ROUGE-L by the longest common subsequence; the set's number is the mean.

    Precision and recall are the largest over the references, each by itself, so they may belong to different
    ones.
    """
    _rows(captions, references)
    each = []
    for words, own in zip(captions, references, strict=True):
        # The published code splits at blanks, so an empty text is one empty word.
        guess = list(words) or [""]
        common = [(_common(guess, list(one) or [""]), len(one) or 1) for one in own]
        precision = max(length / len(guess) for length, _ in common)
        recall = max(length / size for length, size in common)
        both = precision and recall
        each.append((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if both else 0.0)
    return Corpus(_mean(each), each)


def _common(first: Words, second: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, start=1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]


@dataclass(frozen=True)
class DocumentFrequency:
    """In how many images' references an n-gram occurs, and of how many images."""

    images: float
    counts: Mapping[Gram, float] = field(repr=False)

    @classmethod
    def of(cls, references: Sequence[Sequence[Words]]) -> "DocumentFrequency":
        """Counted over reference sets, one per image."""
        counts: Counter[Gram] = Counter()
        for own in references:
            counts.update({gram for words in own for gram in ngrams(words)})
        return cls(float(len(references)), counts)

    def weight(self, gram: Gram) -> float:
        """Inverse document frequency; an n-gram that was never seen counts as seen once."""
        return math.log(self.images) - math.log(max(1.0, self.counts.get(gram, 0.0)))


class _Weighted(NamedTuple):
    """An n-gram's weight by order, the norms of these vectors, and the length CIDEr-D compares: the number of
    bigrams."""

    grams: list[dict[Gram, float]]
    norms: list[float]
    length: int


def cider_d(
    captions: Sequence[Words],
    references: Sequence[Sequence[Words]],
    *,
    frequency: DocumentFrequency | None = None,
) -> Corpus:
    """CIDEr-D; the set's number is the mean.

    `frequency`: document frequencies of another corpus, as the reward of self-critical training takes them
    from the training set; None counts them over `references`. With a single image and no other corpus every
    weight, and so the score, is 0.
    """
    _rows(captions, references)
    frequency = DocumentFrequency.of(references) if frequency is None else frequency
    each = []
    for words, own in zip(captions, references, strict=True):
        guess = _weighted(words, frequency)
        similar = [_similarity(guess, _weighted(one, frequency)) for one in own]
        each.append(10 * sum(similar) / len(own))
    return Corpus(_mean(each), each)


def _weighted(words: Words, frequency: DocumentFrequency) -> _Weighted:
    grams: list[dict[Gram, float]] = [{} for _ in range(ORDERS)]
    for gram, count in ngrams(words).items():
        grams[len(gram) - 1][gram] = count * frequency.weight(gram)
    norms = [math.sqrt(sum(value**2 for value in part.values())) for part in grams]
    return _Weighted(grams, norms, max(0, len(words) - 1))


def _similarity(guess: _Weighted, truth: _Weighted) -> float:
    """Mean over the orders of the clipped cosine, times the penalty for another length."""
    total = 0.0
    for mine, theirs, a, b in zip(guess.grams, truth.grams, guess.norms, truth.norms, strict=True):
        value = sum(
            min(weight, theirs[gram]) * theirs[gram] for gram, weight in mine.items() if gram in theirs
        )
        total += value / (a * b) if a and b else value
    return total / ORDERS * math.exp(-((guess.length - truth.length) ** 2) / (2 * SIGMA**2))


def reward_words(text: str) -> list[str]:
    """Words of a caption as self-critical training compares them: split at blanks, a final full stop removed,
    <eos> put at the end.

    Texts are cleaned before (`vlp_data.text.pre_caption`); there is no treebank tokenizer here.
    """
    return [*text.strip().removesuffix(".").split(), "<eos>"]


def rewards(
    captions: Sequence[str], references: Sequence[Sequence[str]], frequency: DocumentFrequency
) -> list[float]:
    """CIDEr-D of sampled captions against the references of their image: the reward of self-critical
    training."""
    guess = [reward_words(text) for text in captions]
    return cider_d(
        guess, [[reward_words(text) for text in own] for own in references], frequency=frequency
    ).each


def ngrams(words: Words) -> Counter[Gram]:
    """How often each n-gram of 1 to 4 words occurs."""
    return Counter(
        tuple(words[start : start + n]) for n in range(1, ORDERS + 1) for start in range(len(words) - n + 1)
    )


def _rows(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions, but references of {len(references)} images")
    if not captions:
        raise ValueError("no captions: a mean of nothing is not defined")
    for row, own in enumerate(references):
        if not own:
            raise ValueError(f"image {row} has no reference caption")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
