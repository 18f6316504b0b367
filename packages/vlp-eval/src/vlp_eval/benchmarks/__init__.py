"""The table of benchmarks: one row each, for `vlp-eval` and for evaluations during training.

A row names what it needs as "module:attribute", so that the table imports neither torch nor option classes.
Rows of other packages come through the entry-point group `vlp.benchmarks` (name of the benchmark =
"module:ROW"; that module must import no torch).

A benchmark of our own is a module of options in this folder, a module that evaluates, and a row here.
"""

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vlp_data.options import ConceptOptions

    from vlp_eval.report import Scores

GROUP = "vlp.benchmarks"
"""Entry-point group of further rows."""

Part = Literal["options", "files", "open", "evaluate", "predictions", "figure"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Benchmark:
    """One benchmark.

    The functions that it names share three values: `data`, what `open` made of the source; `options`, an
    instance of the class `options`; and `subject`, a `vlp_eval.subject.Subject`.
    """

    name: str
    """Command of `vlp-eval`, and name of the report."""
    about: str
    """One line for lists of benchmarks."""
    ability: str
    """What a model must be able to do (`vlp_core.models.load(path, ability=...)`)."""
    holds: str
    """What a data format must hold: "captions", "questions", "sentences", "hypotheses" or
    "expression_boxes", or what a format of another package holds (`vlp_data.sources.Format.holds`)."""
    format: str = ""
    """Data format of a command that names none; "": it must name one."""
    options: str
    """Dataclass of how the benchmark is taken; extends `vlp_eval.benchmarks.options.BenchmarkOptions`, and
    `TextBenchmarkOptions` where texts are read."""
    files: str = ""
    """Dataclass of the paths that belong to the data beside its source; "": there are none."""
    open: str = ""
    """`open(source, files, options) -> data`, which also refuses options that do not fit the files; `files`
    is None where there is no such class. "": the source itself is the data."""
    evaluate: str
    """`evaluate(subject, data, options, execution) -> Scores`."""
    predictions: str = ""
    """`predictions(scores, folder) -> Path` writes the file that a server or an official script takes; "":
    there is none."""
    figure: str
    """`figure(scores, data, options, subject) -> PIL image` with some samples."""
    metrics: tuple[str, ...]
    """Names of its numbers. The data may add others, such as those of its splits."""
    results: tuple[str, ...] = ()
    """Names of its results where one evaluation has several, such as before and after re-ranking; the last
    one that was computed counts. Empty: one result."""
    reads_text: bool = True
    """Whether the model's tokenizer is needed."""
    pad_concepts: bool = False
    """Whether the concepts of all images are padded to one length, so that the features of an image do not
    depend on its batch."""
    earlier: Mapping[str, str] = field(default_factory=dict)
    """Keys of earlier versions, and what became of each in a few words ("it is called candidates now")."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names under which `numbers` reports, as far as they do not depend on the data."""
        if not self.results:
            return self.metrics
        return tuple(f"{result}/{metric}" for result in self.results for metric in self.metrics)

    def numbers(self, scores: "Scores") -> dict[str, float]:
        """The numbers that a training run reports: all of the result, or of each result those in `metrics`
        with the name of the result in front ("reranked/r_mean")."""
        if not self.results:
            return dict(scores.metrics)
        return {
            f"{result}/{name}": value
            for result, numbers in scores.results.items()
            for name, value in numbers.items()
            if name in self.metrics
        }

    def concepts(self, trained: "ConceptOptions | None") -> "ConceptOptions | None":
        """How concepts are read by a model that was trained with `trained`: none are drawn at random, and
        `pad_concepts` pads them all alike. None stays None."""
        from vlp_eval.concepts import as_evaluated

        return None if trained is None else as_evaluated(trained, alike=self.pad_concepts)

    def part(self, part: Part) -> Any:
        """The class or function that the row names, imported now; None where it names none. Raises
        ImportError or AttributeError for a name that is not there."""
        module, _, name = getattr(self, part).partition(":")
        return getattr(importlib.import_module(module), name) if module else None


ROWS = (
    Benchmark(
        name="retrieval",
        about="Image-text retrieval, by similarity and re-ranked",
        ability="retrieval",
        holds="captions",
        options="vlp_eval.benchmarks.retrieval:RetrievalOptions",
        open="vlp_eval.retrieval:open_gallery",
        evaluate="vlp_eval.retrieval:evaluate_retrieval",
        figure="vlp_eval.figures:retrieval_figure",
        metrics=("tr_r1", "tr_r5", "tr_r10", "ir_r1", "ir_r5", "ir_r10", "r_mean"),
        results=("dual", "reranked", "pairs"),
        pad_concepts=True,
    ),
    Benchmark(
        name="vqa",
        about="Visual question answering: answers chosen, written, or of the model's own classes",
        ability="vqa",
        holds="questions",
        format="task_json",
        options="vlp_eval.benchmarks.vqa:VqaOptions",
        files="vlp_eval.benchmarks.vqa:VqaFiles",
        open="vlp_eval.vqa:open_questions",
        evaluate="vlp_eval.vqa:evaluate_vqa",
        predictions="vlp_eval.predictions:answers",
        figure="vlp_eval.figures:samples_figure",
        metrics=("accuracy", "yes/no", "number", "other"),
        earlier={"k": "it is called candidates now", "pairs": "it is called pair_batch now"},
    ),
    Benchmark(
        name="nlvr",
        about="NLVR2: sentences about two images",
        ability="nlvr",
        holds="sentences",
        format="task_json",
        options="vlp_eval.benchmarks.statements:NlvrOptions",
        evaluate="vlp_eval.statements:evaluate_nlvr",
        predictions="vlp_eval.predictions:sentence_labels",
        figure="vlp_eval.figures:samples_figure",
        metrics=("accuracy", "consistency", "False", "True"),
    ),
    Benchmark(
        name="entailment",
        about="SNLI-VE: does a hypothesis follow from an image?",
        ability="entailment",
        holds="hypotheses",
        format="task_json",
        options="vlp_eval.benchmarks.statements:EntailmentOptions",
        evaluate="vlp_eval.statements:evaluate_entailment",
        predictions="vlp_eval.predictions:hypothesis_labels",
        figure="vlp_eval.figures:samples_figure",
        metrics=("accuracy", "contradiction", "neutral", "entailment"),
    ),
    Benchmark(
        name="grounding",
        about="Referring expressions: the box that the model predicts",
        ability="boxes",
        holds="expression_boxes",
        format="refer",
        options="vlp_eval.benchmarks.grounding:GroundingOptions",
        evaluate="vlp_eval.grounding:evaluate_grounding",
        predictions="vlp_eval.predictions:boxes",
        figure="vlp_eval.figures:grounding_figure",
        metrics=("accuracy",),
        pad_concepts=True,
        earlier={
            "by": "predicted boxes are this benchmark, heat of attention is `vlp-eval weak_grounding`",
            "layer": "heat of attention is `vlp-eval weak_grounding` now, which has this key",
            "mode": "heat of attention is `vlp-eval weak_grounding` now, which has this key",
            "alpha": "heat of attention is `vlp-eval weak_grounding` now, which has this key",
        },
    ),
    Benchmark(
        name="weak_grounding",
        about="Referring expressions without box training: heat of attention chooses among detections",
        ability="weak_grounding",
        holds="expression_boxes",
        format="refer",
        options="vlp_eval.benchmarks.grounding:WeakGroundingOptions",
        evaluate="vlp_eval.grounding:evaluate_weak_grounding",
        predictions="vlp_eval.predictions:boxes",
        figure="vlp_eval.figures:heat_figure",
        metrics=("accuracy",),
        pad_concepts=True,
        earlier={"by": "this benchmark is always by heat; predicted boxes are `vlp-eval grounding`"},
    ),
    Benchmark(
        name="captioning",
        about="Image captioning",
        ability="captioning",
        holds="captions",
        options="vlp_eval.benchmarks.captioning:CaptioningOptions",
        files="vlp_eval.benchmarks.captioning:CaptioningFiles",
        open="vlp_eval.captioning:open_captions",
        evaluate="vlp_eval.captioning:evaluate_captioning",
        predictions="vlp_eval.predictions:captions",
        figure="vlp_eval.figures:samples_figure",
        metrics=("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "meteor", "spice"),
    ),
)
"""Our own benchmarks."""

OWN = {row.name: row for row in ROWS}
"""The same by name."""


@functools.cache
def benchmarks() -> Mapping[str, Benchmark]:
    """All benchmarks by name: our own, then those of other packages in order of their names.

    Raises ValueError that names the entry point of a row that cannot be imported, is no `Benchmark`, or has
    the name of another one.
    """
    from importlib.metadata import entry_points

    rows = dict(OWN)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        where = f"the benchmark {point.name} = {point.value} of {point.dist.name if point.dist else '?'}"
        try:
            row = point.load()
        except Exception as problem:
            raise ValueError(f"{where} cannot be imported: {problem!r}") from problem
        if not isinstance(row, Benchmark):
            kind = type(row).__name__
            # Not a type error: the package that declares it is at fault.
            raise ValueError(f"{where} is no vlp_eval.benchmarks.Benchmark but a {kind}")  # noqa: TRY004
        if row.name != point.name:
            raise ValueError(f"{where} calls itself {row.name}; give both one name")
        if row.name in rows:
            raise ValueError(f"{where} has the name of another benchmark; give it a name of its own")
        rows[row.name] = row
    return MappingProxyType(rows)


def find(name: str) -> Benchmark:
    """The benchmark of a name; packages are asked only for what is not our own, because that takes time.
    Raises ValueError that lists all names; see also `benchmarks`."""
    rows = OWN if name in OWN else benchmarks()
    if name not in rows:
        raise ValueError(f"benchmark {name!r} is not known; choose among {', '.join(rows)}")
    return rows[name]
