"""What is evaluated: a model with everything that says how it sees images and reads texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from vlp_core import models
from vlp_data import views
from vlp_data.checks import from_mapping
from vlp_data.options import ConceptOptions, TokenizerFiles
from vlp_data.text import Reading, Tokenizer

from vlp_eval.benchmarks import Benchmark
from vlp_eval.benchmarks.options import TextBenchmarkOptions
from vlp_eval.concepts import ConceptReader, reads_concepts, require_fit
from vlp_eval.inference import View

UNSAID = {"max_words": 30, "max_tokens": 40}
"""How texts are read where a checkpoint does not say (official files): as X-VLM, ALBEF and ViCHA evaluate."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model ready for evaluation, from an export (`Subject.of`) or as a training run holds it."""

    model: Any
    """Has the methods that its benchmark asks for (`vlp_eval.protocol`)."""
    view: View
    """From a decoded image to the model's input [3,H,W]; picklable when worker processes are used."""
    tokenizer: Tokenizer | None = None
    """None: the model reads no text, or the benchmark needs none."""
    reading: Reading | None = None
    """How texts become ids; None without tokenizer."""
    concepts: ConceptOptions | None = None
    """How the words attached to each image are read; needed by a model with a concept encoder and refused
    with any other (`Benchmark.concepts` makes them of those of training)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else the checkpoint says of itself, such as the `prompt` of captions."""

    @classmethod
    def of(
        cls,
        loaded: models.Loaded,
        benchmark: Benchmark,
        *,
        tokenizer: Sequence[str] = (),
        concepts: ConceptOptions | None = None,
        device: torch.device | str | None = None,
        name: str = "the checkpoint",
    ) -> "Subject":
        """The subject of a loaded checkpoint.

        Args:
            loaded: The checkpoint.
            benchmark: What it is evaluated on; says whether a tokenizer is opened and concepts are padded.
            tokenizer: Files of the vocabulary; empty takes the checkpoint's.
            concepts: How concepts are read; None takes what the checkpoint was trained with.
            device: Where the model goes; None leaves it where it is.
            name: Of the checkpoint, in messages.

        Raises:
            ValueError: A checkpoint that does not say how images are viewed, or reads no text where the
                benchmark has some; no vocabulary, or one of another size than the model was trained with;
                DataError: files that hold something else.
        """
        if loaded.view is None:
            raise ValueError(f"{name} does not say how its images are viewed; config.json needs `view`")
        if benchmark.reads_text and loaded.reading is None:
            raise ValueError(f"{name} is a model that reads no text, which {benchmark.name} needs")
        if concepts is None and reads_concepts(loaded.model):
            concepts = benchmark.concepts(_trained_concepts(loaded.settings.get("concepts", {})))
        words = reading = None
        if loaded.reading is not None and (benchmark.reads_text or concepts is not None):
            words = _open_tokenizer(tokenizer, loaded, name)
            own = {
                key: value for key, value in loaded.reading.items() if key not in ("tokenizer", "vocabulary")
            }
            reading = Reading.from_config({**UNSAID, **own})
        return cls(
            model=loaded.model if device is None else loaded.model.to(device),
            view=views.evaluation(views.from_config(loaded.view)),
            tokenizer=words,
            reading=reading,
            concepts=concepts,
            settings=loaded.settings,
        )

    def concept_reader(self) -> ConceptReader | None:
        """What reads the words attached to images; None for a model that reads none. Raises ValueError
        where model and `concepts` do not fit, or without tokenizer."""
        require_fit(self.model, self.concepts)
        return None if self.concepts is None else ConceptReader(self.text()[0], self.concepts)

    def text(self) -> tuple[Tokenizer, Reading]:
        """Tokenizer and reading. Raises ValueError for a subject that has none."""
        if self.tokenizer is None or self.reading is None:
            raise ValueError(f"this {type(self.model).__name__} comes without tokenizer and reads no text")
        return self.tokenizer, self.reading

    def reads(self, options: TextBenchmarkOptions) -> Reading:
        """How the texts of a benchmark are read: as the options say, else as in training. Raises ValueError
        as `text`."""
        _, trained = self.text()
        tokens = options.max_tokens
        return replace(
            trained,
            clean=options.clean or trained.clean,
            max_words=options.max_words or trained.max_words,
            max_tokens=trained.max_tokens if tokens is None else None if tokens == "all" else tokens,
        )


def _open_tokenizer(files: Sequence[str], loaded: models.Loaded, name: str) -> Tokenizer:
    """The tokenizer of a checkpoint, of other files if some are given. Refuses one that has not as many ids
    as the model."""
    said = loaded.reading or {}
    config = {**said["tokenizer"], **({"files": list(files)} if files else {})}
    try:
        words = TokenizerFiles.from_config(config).open()
    except ValueError as problem:
        lacks = "" if config["files"] else f"{name} holds no vocabulary: "
        raise ValueError(
            f"{lacks}{problem}; give the files of the vocabulary that {name} was trained with, such as "
            "tokenizer=[vocab.txt]"
        ) from problem
    known = said.get("vocabulary") or _vocabulary(loaded.model)
    if known is not None and words.vocabulary != known:
        raise ValueError(
            f"the tokenizer has {words.vocabulary} tokens, {name} was trained with {known}: another "
            "vocabulary"
        )
    return words


def _vocabulary(model: Any) -> int | None:
    """How many ids the text encoder of a model knows, where it has one that tells."""
    embedding = getattr(getattr(model, "text", None), "word_embedding", None)
    return getattr(embedding, "num_embeddings", None)


def _trained_concepts(config: Mapping[str, Any]) -> ConceptOptions:
    names = [field.name for field in fields(ConceptOptions)]
    return from_mapping(ConceptOptions, config, names, "concepts")
