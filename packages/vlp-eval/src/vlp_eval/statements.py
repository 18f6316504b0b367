"""Statements about images, true or not: NLVR2 (a sentence and two images) and SNLI-VE (a hypothesis and one
image).

Source: NLVR2, arXiv 1811.00491; SNLI-VE, arXiv 1901.06706; evaluation of ALBEF (arXiv 2107.07651) and X-VLM
`NLVR.py`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from vlp_data.errors import DataError
from vlp_data.schema import Role, Sample, Source
from vlp_data.sources.task_json import ENTAILMENT_LABELS, NLVR_LABELS

from vlp_eval.benchmarks.options import TextBenchmarkOptions
from vlp_eval.benchmarks.statements import EntailmentOptions, NlvrOptions
from vlp_eval.concepts import require_fit
from vlp_eval.inference import (
    EXECUTION,
    Execution,
    ImageBatch,
    evaluate_rows,
    read,
    require_unique,
    settings_of,
)
from vlp_eval.metrics import labels as metric
from vlp_eval.report import Scores
from vlp_eval.subject import Subject


class _Statement(NamedTuple):
    id: str
    text: str
    label: int


def evaluate_nlvr(
    subject: Subject, source: Source, options: NlvrOptions, execution: Execution = EXECUTION
) -> Scores:
    """Whether sentences about two images are true: accuracy, and consistency where the rows carry NLVR2
    identifiers.

    Consistency is the share of sentences that are right with all of their image pairs; only a whole split
    makes it meaningful. `chance` is the share of the more frequent label. The model is a
    `vlp_eval.protocol.PairClassifier`. Arguments and errors as in `evaluate_vqa`.
    """
    model = subject.model

    def logits(batch: ImageBatch, ids: Tensor, mask: Tensor) -> Tensor:
        rows = torch.arange(len(ids), device=ids.device)
        return model(batch.groups, rows, rows + len(rows), ids, mask)

    return _evaluate(
        "nlvr", subject, logits, source, options, execution, role="sentence", images=2, names=NLVR_LABELS
    )


def evaluate_entailment(
    subject: Subject, source: Source, options: EntailmentOptions, execution: Execution = EXECUTION
) -> Scores:
    """Whether hypotheses follow from an image (contradiction, neutral, entailment): accuracy on the original
    labels, and of each label.

    `chance` is the share of the most frequent label. The model is a `vlp_eval.protocol.Classifier`. Arguments
    and errors as in `evaluate_vqa`.
    """
    model = subject.model

    def logits(batch: ImageBatch, ids: Tensor, mask: Tensor) -> Tensor:
        return model(batch.images, ids, mask)

    return _evaluate(
        "entailment",
        subject,
        logits,
        source,
        options,
        execution,
        role="hypothesis",
        images=1,
        names=ENTAILMENT_LABELS,
    )


@torch.no_grad()
def _evaluate(
    benchmark: str,
    subject: Subject,
    logits: Callable[[ImageBatch, Tensor, Tensor], Tensor],
    source: Source,
    options: TextBenchmarkOptions,
    execution: Execution,
    *,
    role: Role,
    images: int,
    names: dict[str, int],
) -> Scores:
    def parse(sample: Sample) -> _Statement:
        texts = [text.text for text in sample.texts if text.role == role]
        label = None if sample.target is None else sample.target.label
        if len(texts) != 1 or len(sample.images) != images or label is None:
            raise DataError(
                f"{sample.key}: {benchmark} needs rows of {images} image(s) with one {role} and its label"
            )
        return _Statement(str(sample.meta.get("identifier", sample.key)), texts[0], label)

    require_fit(subject.model, subject.concepts)
    tokenizer, reading = subject.text()[0], subject.reads(options)
    statements = read(source, parse, options.limit, subject.concepts)
    require_unique((one.id for one in statements), "statement")

    def run(rows: Sequence[int], batch: ImageBatch) -> list[int]:
        ids, mask = reading.encode(tokenizer, [statements[row].text for row in rows], batch.groups[0].device)
        found = logits(batch, ids, mask)
        if found.shape != (len(rows), len(names)):
            raise ValueError(
                f"the model gives logits of shape {tuple(found.shape)} for {len(rows)} statements of "
                f"{len(names)} labels"
            )
        if found.isnan().any():
            raise ValueError("a logit is NaN")
        return found.argmax(1).tolist()

    given = evaluate_rows(subject, source, len(statements), run, options, execution, what="statements")
    predictions = {one.id: label for one, label in zip(statements, given, strict=True)}
    truth = {one.id: one.label for one in statements}
    found = metric.accuracy(predictions, truth)
    word = {number: name for name, number in names.items()}
    numbers, hits = {"accuracy": found.accuracy}, {"accuracy": found.correct}
    counts, notes = {"statements": found.total}, []
    if benchmark == "nlvr":
        try:
            agree = metric.consistency(predictions, truth)
        except ValueError as problem:
            notes.append(f"no consistency: {problem}")
        else:
            numbers["consistency"], hits["consistency"] = agree.accuracy, agree.correct
            counts["sentences"] = agree.total
    numbers |= {word[label]: share for label, share in sorted(found.labels.items())}
    frequent = Counter(truth.values()).most_common(1)[0][1]
    return Scores(
        benchmark=benchmark,
        settings={
            **settings_of(subject, execution, reading),
            "chance": "always the most frequent label",
        },
        counts=counts,
        results={"classified": numbers},
        hits={"classified": hits},
        chance={"accuracy": 100 * frequent / found.total},
        samples={
            "statements": [
                {"id": one.id, "text": one.text, "label": word[one.label], "predicted": word[label]}
                for one, label in zip(statements, given, strict=True)
            ]
        },
        notes=tuple(notes),
    )
