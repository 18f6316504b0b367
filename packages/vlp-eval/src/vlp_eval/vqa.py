"""Visual question answering: answers chosen from a list by likelihood, or written by beam search.

Choosing is the way of ALBEF, X-VLM and ViCHA (X-VLM `VQA.py`, specification 4.4): of the answers whose first
word is most probable, the one that the decoder finds most likely. The accuracy is the official one where ten
annotators answered (`vlp_eval.metrics.vqa`); where each question has one answer (VLUE) it is the share of
answers that equal it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from vlp_data.errors import DataError
from vlp_data.examples import answer_ids
from vlp_data.schema import Identifier, Sample, Source
from vlp_data.sources.rows import read_json
from vlp_data.text import Tokenizer, pre_question

from vlp_eval.concepts import require_fit
from vlp_eval.inference import ImageBatch, Reading, RowOptions, evaluate_rows, read, require_unique
from vlp_eval.metrics import vqa as metric
from vlp_eval.protocol import QuestionAnswering
from vlp_eval.report import Scores

READING = Reading(max_words=50)
"""How questions are read where nothing else is said."""


class _Question(NamedTuple):
    id: Identifier
    text: str
    answers: tuple[str, ...]


@torch.no_grad()
def evaluate_vqa(
    model: QuestionAnswering,
    source: Source,
    tokenizer: Tokenizer,
    options: RowOptions,
    *,
    candidates: Sequence[str] | None,
    k: int = 128,
    annotations: Mapping[Identifier, Mapping[str, Any]] | None = None,
    variant: metric.Variant = "official",
    reading: Reading = READING,
    answer_tokens: int = 10,
    beams: int = 3,
    pairs: int = 1024,
) -> Scores:
    """Answer every question of a source.

    Args:
        model: Made for questions; in evaluation mode meanwhile.
        source: Rows of an image with a question; `question_id`, or the key of the row, names it.
        tokenizer: The model's.
        options: How rows are read; with `concepts` the model is given those of each image.
        candidates: The answers to choose from; None lets the model write.
        k: So many candidates are scored to the end.
        annotations: What people answered, by question id, as in the `annotations` of VQA v2 files: gives
            accuracies per answer type too. None takes the answers of the rows; where they have none the
            result has no accuracy.
        variant: "official", or "albef" for comparing with logs of the ALBEF family.
        reading: How questions become ids.
        answer_tokens: Longest answer that is written, the start token included.
        beams: Of the search, where answers are written.
        pairs: Candidates scored at a time.

    Raises:
        DataError: A row without question or image, an image without concepts where they are wanted, or an id
            that occurs twice; ValueError: settings that cannot take effect, concepts for a model that reads
            none or none for one that does, an image that cannot be opened, annotations of other questions.
    """
    require_fit(model, options.concepts)
    questions = read(source, _question, options)
    require_unique((one.id for one in questions), "question")
    if candidates is not None and not 1 <= k <= len(candidates):
        raise ValueError(f"k={k} must lie in 1..{len(candidates)}, the number of answers to choose from")
    answers = _answers(questions, annotations)
    choices = None if candidates is None else answer_ids(tokenizer, candidates)

    def run(rows: Sequence[int], images: ImageBatch) -> list[str]:
        device = images.image.device
        ids, mask = reading.encode(
            tokenizer, [questions[row].text for row in rows], device, clean=pre_question
        )
        states = model.ask(images.image.squeeze(1), ids, mask, *images.given)
        if candidates is not None and choices is not None:
            ranked = model.rank_answers(
                states, mask, choices.ids.to(device), choices.attention_mask.to(device), k, pairs=pairs
            )
            best = ranked.indices[:, 0]
            return [candidates[place] for place in best.tolist()]
        written = model.generate_answers(
            states,
            mask,
            start_id=tokenizer.cls_id,
            end_id=tokenizer.sep_id,
            pad_id=tokenizer.pad_id,
            beams=beams,
            max_tokens=answer_tokens,
        )
        return [tokenizer.decode(row) for row in written.ids.tolist()]

    given = evaluate_rows(model, source, len(questions), run, options, tokenizer=tokenizer, what="questions")
    settings = {"k": k, "candidates": len(candidates)} if candidates is not None else {"beams": beams}
    settings |= {**asdict(reading), **options.settings()}
    return _scores(
        questions, given, answers, annotations, variant, "chosen" if candidates else "written", settings
    )


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
            f"question {single!r} has a single answer, others have several; their accuracies are no mean: leave one kind out"
        )
    return {one.id: one.answers for one in known} or None


def _scores(
    questions: Sequence[_Question],
    given: Sequence[str],
    answers: Mapping[Identifier, Sequence[str]] | None,
    annotations: Mapping[Identifier, Mapping[str, Any]] | None,
    variant: metric.Variant,
    stage: str,
    settings: dict[str, Any],
) -> Scores:
    samples = [
        {"id": one.id, "question": one.text, "answer": answer}
        for one, answer in zip(questions, given, strict=True)
    ]
    build = partial(Scores, benchmark="vqa", counts={"questions": len(questions)})
    if answers is None:
        note = "the questions come without answers: no accuracy, only the file to send to the server"
        return build(settings=settings, stages={}, hits={}, samples={"questions": samples}, notes=(note,))
    predictions = {one.id: answer for one, answer in zip(questions, given, strict=True)}
    common, _ = Counter(answer for own in answers.values() for answer in own).most_common(1)[0]
    constant = dict.fromkeys(predictions, common)
    if all(len(own) == 1 for own in answers.values()):
        right = {one: [predictions[one]] == list(own) for one, own in answers.items()}
        numbers = {"accuracy": 100 * sum(right.values()) / len(right)}
        chance = {"accuracy": 100 * sum([common] == list(own) for own in answers.values()) / len(right)}
        each, rule = {one: 100.0 * value for one, value in right.items()}, "equal"
        hits = {stage: {"accuracy": sum(right.values())}}
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
        stages={stage: numbers},
        hits=hits,
        chance=chance,
        samples={"questions": samples},
    )


def read_candidates(path: str) -> list[str]:
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
