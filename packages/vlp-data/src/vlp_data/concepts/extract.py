"""The vocabulary of concepts: what the captions of a data set name, counted.

Source: ViCHA specification 5.3. The reference stores the number of mentions minus one, so its `thresh` t is
`min_count` t + 2.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from vlp_data.concepts.grammar import Parse, concepts, parse_of
from vlp_data.concepts.tables import to_rows
from vlp_data.errors import DataError
from vlp_data.identity import checksum
from vlp_data.sources.rows import read_json

Parser: TypeAlias = Callable[[Sequence[str]], Iterable[Parse]]
"""Captions to their parses, in order."""
CAPTION_FIELDS = ("caption", "sentence", "question", "text")
SPACY_MODEL = "en_core_web_sm"


def spacy_parser(model: str = SPACY_MODEL, *, processes: int = 1, batch: int = 256) -> Parser:
    """Captions parsed by a model of spaCy. Raises DataError with the command to run when spaCy or the model
    is not installed."""
    try:
        import spacy
    except ImportError as error:
        raise DataError(
            f"parsing captions needs spaCy ({error}); `pip install 'vlp-data[spacy]'`, "
            f"then `python -m spacy download {model}`"
        ) from error
    try:
        # The grammar uses parts of speech and dependencies alone.
        nlp = spacy.load(model, exclude=["ner", "lemmatizer", "senter"])
    except OSError as error:
        raise DataError(
            f"the spaCy model {model} is not installed; `python -m spacy download {model}` installs it"
        ) from error

    def parse(captions: Sequence[str]) -> Iterator[Parse]:
        for doc in nlp.pipe(captions, batch_size=batch, n_process=processes):
            yield Parse(
                words=tuple(token.text for token in doc),
                pos=tuple(token.pos_ for token in doc),
                heads=tuple(token.head.i for token in doc),
                deps=tuple(token.dep_ for token in doc),
            )

    return parse


def given_parses(parses: Mapping[str, Parse]) -> Parser:
    """Parses made elsewhere, by caption. The parser raises DataError for a caption that has none."""

    def parse(captions: Sequence[str]) -> Iterator[Parse]:
        for caption in captions:
            if caption not in parses:
                raise DataError(f"no parse was given for the caption {caption!r}")
            yield parses[caption]

    return parse


def read_parses(path: str) -> dict[str, Parse]:
    """A JSON list of {caption, words, pos, heads, deps}. Raises FileNotFoundError, DataError."""
    found = {}
    for number, entry in enumerate(read_json(path, list)):
        try:
            found[entry["caption"]] = parse_of(entry)
        except (KeyError, TypeError, DataError) as error:
            raise DataError(f"{path}: entry {number}: {error}") from error
    return found


def captions_of(table: pa.Table, name: str = "") -> pa.Array:
    """All texts of a field of a list, one after the other; a row may hold one or several.

    `name` "": the first of caption, sentence, question, text that the list has. Raises DataError.
    """
    name = name or next((each for each in CAPTION_FIELDS if each in table.column_names), "")
    if name not in table.column_names:
        wanted = f"no `{name}`" if name else f"none of the fields {', '.join(CAPTION_FIELDS)}"
        raise DataError(f"the list has {wanted}, only {', '.join(table.column_names)}")
    kind = table.schema.field(name).type
    if pa.types.is_list(kind):
        return pc.list_flatten(table[name].combine_chunks()).cast(pa.string())
    texts: list[str] = []
    for row in to_rows(table.select([name])):
        value = row.get(name)
        texts += [value] if isinstance(value, str) else value or []
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"`{name}` of the list must hold texts")
    return pa.array(texts, pa.string())


def count(mentions: Iterable[str]) -> dict[str, int]:
    """How often each concept is named, lower-cased, in the order of first mention."""
    return dict(Counter(mention.lower() for mention in mentions))


def add(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counts of consecutive parts, together. The order of first mention is kept."""
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return dict(total)


def vocabulary(
    counts: Mapping[str, int], *, min_count: int = 2, max_concepts: int | None = None
) -> dict[str, int]:
    """The concepts named at least `min_count` times, most frequent first, those named first before others of
    the same count.

    `max_concepts`: no more than that many of them.
    """
    if min_count < 1 or (max_concepts is not None and max_concepts < 1):
        raise ValueError(f"min_count={min_count} and max_concepts={max_concepts} must be at least 1")
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    return dict([item for item in ranked if item[1] >= min_count][:max_concepts])


@dataclass(frozen=True, kw_only=True)
class CountConcepts:
    """Work of a job: captions (column `text`) to the counts of their concepts."""

    model: str = SPACY_MODEL
    parses: str = ""
    """File of parses made elsewhere (`read_parses`) instead of a model."""
    legacy: bool = False
    """The rules that the released vocabularies were made with (`grammar.concepts`)."""
    processes: int = 1

    def identity(self) -> dict[str, Any]:
        parser = [self.parses, checksum(self.parses)] if self.parses else self.model
        return {"work": "extract", "parser": parser, "legacy": self.legacy}

    def start(self) -> Callable[[pa.Table], pa.Table]:
        if self.parses:
            parser = given_parses(read_parses(self.parses))
        else:
            parser = spacy_parser(self.model, processes=self.processes)

        def compute(items: pa.Table) -> pa.Table:
            parses = parser(items["text"].to_pylist())
            counts = count(concept for parse in parses for concept in concepts(parse, legacy=self.legacy))
            return counts_table(counts)

        return compute


def counts_table(counts: Mapping[str, int]) -> pa.Table:
    """Columns concept, count."""
    return pa.table(
        {"concept": pa.array(list(counts), pa.string()), "count": pa.array(list(counts.values()), pa.int64())}
    )


def counts_of(table: pa.Table) -> dict[str, int]:
    """The counts of a table in which a concept may occur in several rows, one per part."""
    columns = (table[name].to_pylist() for name in ("concept", "count"))
    return add({concept: number} for concept, number in zip(*columns, strict=True))
