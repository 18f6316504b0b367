"""What is evaluated: a model with everything that says how it sees images and reads texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from vlp_core import models
from vlp_data.options import ConceptOptions
from vlp_data.text import Tokenizer
from vlp_data.transforms import eval_view

from vlp_eval.benchmarks import Benchmark
from vlp_eval.benchmarks.options import TextBenchmarkOptions
from vlp_eval.concepts import ConceptReader, reads_concepts, require_fit
from vlp_eval.inference import Reading, View


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
            ValueError: No vocabulary, or one of another size than the model was trained with; one for a
                model that reads no text.
        """
        text = loaded.settings.get("text", {})
        words = reading = None
        if benchmark.reads_text:
            words = open_tokenizer(tokenizer, text, name)
            known = loaded.model.text.word_embedding.num_embeddings
            if words.vocabulary != known:
                raise ValueError(
                    f"the tokenizer has {words.vocabulary} tokens, {name} was trained with {known}: another "
                    "vocabulary"
                )
            reading = Reading(
                max_words=text.get("max_words", 30),
                max_tokens=text.get("max_tokens", 40),
                separator=text.get("separator", False),
            )
        if concepts is None and reads_concepts(loaded.model):
            concepts = benchmark.concepts(ConceptOptions(**loaded.settings.get("concepts", {})))
        return cls(
            model=loaded.model if device is None else loaded.model.to(device),
            view=partial(eval_view, size=loaded.settings["image_size"]),
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


def open_tokenizer(files: Sequence[str], text: Mapping[str, Any], checkpoint: str) -> Tokenizer:
    """The tokenizer of `files`, else of the checkpoint's `text` settings; one file is WordPiece, two are
    RoBERTa's."""
    kind = text.get("kind", "bert")
    needed = {"bert": 1, "roberta": 2}[kind]
    chosen = tuple(files) or tuple(text.get("files", ()))
    if len(chosen) != needed:
        wanted = "tokenizer=[vocab.txt]" if needed == 1 else "tokenizer=[vocab.json,merges.txt]"
        raise ValueError(
            f"{checkpoint} has a {kind} text encoder, which takes {needed} tokenizer file(s), and "
            + (f"{list(chosen)} was given" if chosen else "holds none")
            + f"; give {wanted}"
        )
    return Tokenizer.wordpiece(chosen[0]) if kind == "bert" else Tokenizer.roberta(*chosen)
