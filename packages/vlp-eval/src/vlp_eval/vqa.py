"""Visual question answering: answers chosen from a list by likelihood, written by beam search, or classified.

Choosing is the way of ALBEF, X-VLM and ViCHA (X-VLM `VQA.py`, specification 4.4): of the answers whose first
word is most probable, the one that the decoder finds most likely. Classifying is that of ViLT and VLC: one
class for each answer that the model was trained with. The accuracy is the official one where ten annotators
answered (`vlp_eval.metrics.vqa`); where each question has one answer (VLUE) it is the share of answers that
equal it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vlp_core.images import Images
from vlp_data.errors import DataError
from vlp_data.examples import answer_ids
from vlp_data.schema import Identifier, Sample, Source
from vlp_data.sources.rows import read_json
from vlp_data.text import Reading, Tokenizer

from vlp_eval.benchmarks.vqa import VqaFiles, VqaOptions
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
from vlp_eval.metrics import vqa as metric
from vlp_eval.protocol import AnswerClasses, QuestionAnswering
from vlp_eval.report import Scores
from vlp_eval.subject import Subject

CANDIDATES, PAIR_BATCH, BEAMS, ANSWER_TOKENS, MAX_WORDS = 128, 1024, 3, 10, 50
"""What `VqaOptions` means by null."""

Answer = Callable[[Images, Tensor, Tensor], list[str]]
"""From images and questions (ids, mask) to one answer each."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What visual question answering is measured on."""

    source: Source
    """Rows of an image with a question; `question_id`, or the key of the row, names it."""
    answers: Sequence[str] | None = None
    """The answers to choose from (mode=rank); None: no list."""
    annotations: Mapping[Identifier, Mapping[str, Any]] | None = None
    """What people answered, by question id, as in the `annotations` of VQA v2 files: gives accuracies per
    answer type too. None takes the answers of the rows; where they have none the result has no accuracy."""


def open_questions(source: Source, files: VqaFiles, options: VqaOptions) -> Questions:
    """Questions with the answers to choose from and the annotations. Raises ValueError for an answer list
    that `options.mode` does not use, or lacks; FileNotFoundError, DataError for the files."""
    if options.mode == "rank" and not files.answers:
        raise ValueError(
            "mode=rank needs answers=answer_list.json, the answers to choose from; give it, or mode=generate "
            "for a model that writes, or mode=classes for one with answer classes of its own"
        )
    if options.mode != "rank" and files.answers:
        raise ValueError(f"answers={files.answers} has no effect with mode={options.mode}; leave it out")
    return Questions(
        source=source,
        answers=read_answers(files.answers) if files.answers else None,
        annotations=read_annotations(files.annotations) if files.annotations else None,
    )


class _Question(NamedTuple):
    id: Identifier
    text: str
    answers: tuple[str, ...]


@torch.no_grad()
def evaluate_vqa(
    subject: Subject, data: Questions, options: VqaOptions, execution: Execution = EXECUTION
) -> Scores:
    """Answer every question.

    Args:
        subject: Its model is a `vlp_eval.protocol.QuestionAnswering`, or with mode=classes an
            `AnswerClasses`; in evaluation mode meanwhile. It is given the concepts of each image where it
            reads some.
        data: The questions.
        options: How they are answered and judged.
        execution: How the evaluation runs.

    Raises:
        DataError: A row without question or image, an image without concepts where they are wanted, or an id
            that occurs twice; ValueError: settings that cannot take effect, concepts for a model that reads
            none or none for one that does, an image that cannot be opened, annotations of other questions.
    """
    require_fit(subject.model, subject.concepts)
    tokenizer, reading = subject.text()[0], _reading(subject, options)
    questions = read(data.source, _question, options.limit, subject.concepts)
    require_unique((one.id for one in questions), "question")
    answers = _answers(questions, data.annotations)
    answer, settings = _WAYS[options.mode](subject.model, tokenizer, data, options)

    def run(rows: Sequence[int], batch: ImageBatch) -> list[str]:
        texts = [questions[row].text for row in rows]
        return answer(batch.images, *reading.encode(tokenizer, texts, batch.images.device))

    given = evaluate_rows(subject, data.source, len(questions), run, options, execution, what="questions")
    settings = {"mode": options.mode, **settings, **settings_of(subject, execution, reading)}
    result = {"rank": "chosen", "generate": "written", "classes": "classified"}[options.mode]
    return _scores(questions, given, answers, data.annotations, options.rule, result, settings)


def _reading(subject: Subject, options: VqaOptions) -> Reading:
    """How questions are read: as the options say, else cleaned as questions by a model that was trained with
    cleaned texts."""
    reading = subject.reads(options)
    if options.clean is None and reading.clean == "caption":
        reading = replace(reading, clean="question")
    if options.max_words is None and reading.clean != "none":
        reading = replace(reading, max_words=MAX_WORDS)
    return reading


def _rank(
    model: QuestionAnswering, tokenizer: Tokenizer, data: Questions, options: VqaOptions
) -> tuple[Answer, dict[str, Any]]:
    if not data.answers:
        raise ValueError("mode=rank needs the answers to choose from")
    listed = data.answers
    count = min(options.candidates or CANDIDATES, len(listed))
    pairs = options.pair_batch or PAIR_BATCH
    choices = answer_ids(tokenizer, listed)

    def answer(images: Images, ids: Tensor, mask: Tensor) -> list[str]:
        ranked = model.rank_answers(
            model.ask(images, ids, mask),
            mask,
            choices.ids.to(ids.device),
            choices.attention_mask.to(ids.device),
            count,
            pairs=pairs,
        )
        return [listed[place] for place in ranked.indices[:, 0].tolist()]

    return answer, {"candidates": count, "answers": len(listed)}


def _generate(
    model: QuestionAnswering, tokenizer: Tokenizer, data: Questions, options: VqaOptions
) -> tuple[Answer, dict[str, Any]]:
    beams, length = options.beams or BEAMS, options.answer_tokens or ANSWER_TOKENS

    def answer(images: Images, ids: Tensor, mask: Tensor) -> list[str]:
        written = model.generate_answers(
            model.ask(images, ids, mask),
            mask,
            start_id=tokenizer.cls_id,
            end_id=tokenizer.sep_id,
            pad_id=tokenizer.pad_id,
            beams=beams,
            max_tokens=length,
        )
        return [tokenizer.decode(row) for row in written.ids.tolist()]

    return answer, {"beams": beams, "answer_tokens": length}


def _classes(
    model: AnswerClasses, tokenizer: Tokenizer, data: Questions, options: VqaOptions
) -> tuple[Answer, dict[str, Any]]:
    if not isinstance(model, AnswerClasses):
        name = type(model).__name__
        # Not a type error: the option does not go with this model.
        raise ValueError(f"mode=classes: {name} has no answer classes of its own")  # noqa: TRY004
    names = tuple(model.answers)

    def answer(images: Images, ids: Tensor, mask: Tensor) -> list[str]:
        logits = model.classify_answers(images, ids, mask)
        if logits.shape != (len(ids), len(names)):
            raise ValueError(
                f"the model gives logits of shape {tuple(logits.shape)} for {len(ids)} questions and "
                f"{len(names)} answers"
            )
        if logits.isnan().any():
            raise ValueError("a logit is NaN")
        return [names[place] for place in logits.argmax(1).tolist()]

    return answer, {"answers": len(names)}


_WAYS: dict[str, Callable[[Any, Tokenizer, Questions, VqaOptions], tuple[Answer, dict[str, Any]]]] = {
    "rank": _rank,
    "generate": _generate,
    "classes": _classes,
}


def _question(sample: Sample) -> _Question:
    asked = [text for text in sample.texts if text.role == "question"]
    if len(asked) != 1 or len(sample.images) != 1:
        raise DataError(f"{sample.key}: answering needs rows of one image with one question")
    name = sample.key if asked[0].id is None else asked[0].id
    return _Question(name, asked[0].text, sample.target.raw_answers if sample.target is not None else ())


def _answers(
    questions: Sequence[_Question], annotations: Mapping[Identifier, Mapping[str, Any]] | None
) -> dict[Identifier, Sequence[str]] | None:
    """What people answered to each question; None where nothing is known of any."""
    if annotations is not None:
        missing = [one.id for one in questions if one.id not in annotations]
        if missing:
            raise ValueError(f"{len(missing)} questions have no annotation, the first is {missing[0]!r}")
        return {one.id: [answer["answer"] for answer in annotations[one.id]["answers"]] for one in questions}
    known = [one for one in questions if one.answers]
    if known and len(known) < len(questions):
        bare = next(one.id for one in questions if not one.answers)
        raise ValueError(
            f"{len(known)} of {len(questions)} questions have answers, {bare!r} has none; leave one kind out"
        )
    if len({len(one.answers) == 1 for one in known}) == 2:
        single = next(one.id for one in known if len(one.answers) == 1)
        raise ValueError(
            f"question {single!r} has a single answer, others have several; their accuracies are no mean: "
            "leave one kind out"
        )
    return {one.id: one.answers for one in known} or None


def _scores(
    questions: Sequence[_Question],
    given: Sequence[str],
    answers: Mapping[Identifier, Sequence[str]] | None,
    annotations: Mapping[Identifier, Mapping[str, Any]] | None,
    variant: metric.Variant,
    result: str,
    settings: dict[str, Any],
) -> Scores:
    samples = [
        {"id": one.id, "question": one.text, "answer": answer}
        for one, answer in zip(questions, given, strict=True)
    ]
    build = partial(Scores, benchmark="vqa", counts={"questions": len(questions)})
    if answers is None:
        note = "the questions come without answers: no accuracy, only the file to send to the server"
        return build(settings=settings, results={}, hits={}, samples={"questions": samples}, notes=(note,))
    predictions = {one.id: answer for one, answer in zip(questions, given, strict=True)}
    common, _ = Counter(answer for own in answers.values() for answer in own).most_common(1)[0]
    constant = dict.fromkeys(predictions, common)
    if all(len(own) == 1 for own in answers.values()):
        right = {one: [predictions[one]] == list(own) for one, own in answers.items()}
        numbers = {"accuracy": 100 * sum(right.values()) / len(right)}
        chance = {"accuracy": 100 * sum([common] == list(own) for own in answers.values()) / len(right)}
        each, rule = {one: 100.0 * value for one, value in right.items()}, "equal"
        hits = {result: {"accuracy": sum(right.values())}}
    else:
        kinds = None
        if annotations is not None:
            kinds = {"answer_type": {one: annotations[one]["answer_type"] for one in predictions}}
        found = metric.accuracy(predictions, answers, variant=variant, groups=kinds)
        blind = metric.accuracy(constant, answers, variant=variant, groups=kinds)
        numbers = {"accuracy": found.overall, **found.groups.get("answer_type", {})}
        chance = {"accuracy": blind.overall, **blind.groups.get("answer_type", {})}
        each, rule, hits = found.questions, variant, {}
    for sample in samples:
        sample |= {"accuracy": each[sample["id"]], "answers": list(answers[sample["id"]])}
    return build(
        settings={**settings, "rule": rule, "chance": f"always {common!r}, the most frequent answer"},
        results={result: numbers},
        hits=hits,
        chance=chance,
        samples={"questions": samples},
    )


def read_answers(path: str) -> list[str]:
    """The answers to choose from: a JSON list of strings (answer_list.json). Raises FileNotFoundError,
    DataError."""
    answers = read_json(path, list)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{path} must be a list of answers, each a string")
    return answers


def read_annotations(path: str) -> dict[Identifier, Mapping[str, Any]]:
    """By question id: the annotations of a VQA v2 file. Raises FileNotFoundError, DataError."""
    content = read_json(path, dict)
    try:
        return {one["question_id"]: one for one in content["annotations"]}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of VQA v2 annotations: {error!r}") from error
