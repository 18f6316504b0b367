"""Lists of tasks: those of the ALBEF family, and the official files of NLVR2, SNLI-VE and VQA as they are.

A file is a JSON list, or lines of one object each; the fields of an entry tell what it is. VQA's own file of
questions is one object, and is joined with its annotations where they are given. Entries without a label or
an answer, as in published test sets, have no target.

Source: X-VLM specification 5.5; ViCHA specification 5.2; lil-lab/nlvr (nlvr2/README.md, names of images);
necla-ml/SNLI-VE; visualqa.org (format of questions and annotations).
"""

import contextlib
import dataclasses
import posixpath
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vlp_data import files
from vlp_data.errors import BadSample, DataError, shown
from vlp_data.paths import image_at, stem
from vlp_data.roots import FolderText, PathText
from vlp_data.schema import Identifier, Role, Sample, Target, Text, whole
from vlp_data.sources import Beginning
from vlp_data.sources.rows import (
    Notes,
    Rows,
    concepts,
    field,
    is_finite,
    objects,
    optional_id,
    read_entries,
    read_json,
    short,
    strings,
)

if TYPE_CHECKING:
    import numpy as np

NLVR_LABELS = {"False": 0, "True": 1}
ENTAILMENT_LABELS = {"contradiction": 0, "neutral": 1, "entailment": 2}
VISUAL_GENOME_WEIGHT = 0.5
_UNLABELLED = (None, "-", "")
"""What stands for no label: SNLI-VE marks pairs without agreement by "-"."""


@dataclass(frozen=True, kw_only=True)
class TaskJson:
    """Lists of tasks in .json files; the fields of an entry tell what it is (caption, vqa, nlvr, ve,
    refcoco)."""

    format: Literal["task_json"] = "task_json"
    files: tuple[PathText, ...]
    """JSON files, each one list of objects, lines of objects, or VQA's own questions; paths or fsspec
    URLs."""
    root: FolderText = ""
    """Folder that relative image paths start at."""
    dataset_roots: dict[str, FolderText] = dataclasses.field(default_factory=dict)
    """Other roots, by the `dataset` field of an entry (VQA lists mix `vqa` and `vg`)."""
    prefixes: dict[str, str] = dataclasses.field(default_factory=dict)
    """{old: new} beginnings of image paths to replace. Where none fits and there is a root, the beginning
    /data/USER/data/ of ViCHA's own lists is dropped."""
    group_captions: bool = False
    """One row per image with all its captions, where a list has one entry per caption (references for
    rewards)."""
    annotations: tuple[PathText, ...] = ()
    """VQA's own annotations, which hold the answers to the questions in `files`."""
    schemes: tuple[str, ...] = ()
    """Schemes of URLs that image paths in the lists may be (s3, https, ...), besides those of the roots."""

    def open(self) -> "TaskJsonSource":
        return open_task_json(self)


@dataclass(eq=False)
class TaskJsonSource:
    """Rows of task lists."""

    options: TaskJson
    paths: tuple[str, ...]
    rows: tuple[Rows, ...]
    first: "np.ndarray"
    """Number of the first row of each file, and of all rows: int64 [files + 1]."""
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    """What did not fit together, with counts."""

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(self.first.searchsorted(index, side="right")) - 1
        row = index - int(self.first[number])
        try:
            return parse_entry(self.rows[number][row], self.paths[number], row, self.options)
        except DataError as error:
            raise BadSample("broken entry", f"{self.paths[number]}:{row}", str(error)) from error

    def describe(self) -> dict[str, Any]:
        kinds: Counter[str] = Counter()
        for path, rows in zip(self.paths, self.rows, strict=True):
            if len(rows):
                kinds[kind_of(rows[0], path)] += 1
        return {
            "format": self.options.format,
            "files": [shown(path) for path in self.paths],
            "rows": len(self),
            "kinds": dict(kinds),
            **({"notes": self.notes} if self.notes else {}),
        }


def open_task_json(options: TaskJson) -> TaskJsonSource:
    """Read the lists. Raises FileNotFoundError; DataError when a file is no list, an entry of unknown kind
    leads it, or all are empty."""
    import numpy as np

    paths, notes = files.expand(options.files), Notes()
    answers = _read_annotations(options.annotations)
    rows = tuple(Rows(_entries(path, answers, notes)) for path in paths)
    if not any(map(len, rows)):
        raise DataError(f"no entry in {', '.join(paths)}")
    if options.group_captions:
        rows = tuple(Rows(_grouped(part, path)) for path, part in zip(paths, rows, strict=True))
    for path, part in zip(paths, rows, strict=True):
        if len(part):
            with contextlib.suppress(BadSample):  # a path that cannot be used: one sample, counted when read
                parse_entry(_row(part, 0, path), path, 0, options)
    if answers is not None:
        _count_unused(answers, rows, paths, options, notes)
    notes.warn(", ".join(options.files))
    return TaskJsonSource(options, tuple(paths), rows, np.cumsum([0, *map(len, rows)]), notes.found())


def _row(rows: Rows, number: int, path: str) -> dict[str, Any]:
    try:
        return rows[number]
    except DataError as error:
        raise DataError(f"{path}: entry {number}: {error}") from error


def _entries(path: str, answers: dict[Identifier, list[str]] | None, notes: Notes) -> list[dict[str, Any]]:
    """The entries of a file, VQA's own questions as entries of a list. Raises DataError."""
    entries = read_entries(path)
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{path}: entry {number} must be an object, found {type(entry).__name__}")
    if len(entries) == 1 and "questions" in entries[0]:
        return _official_questions(entries[0], path, answers, notes)
    if answers is not None:
        raise DataError(f"{path} is no file of VQA's own questions; annotations belong to those alone")
    return entries


# ------------------------------------------------------------------------------------ VQA's own files


def _official_questions(
    content: dict[str, Any], path: str, answers: dict[Identifier, list[str]] | None, notes: Notes
) -> list[dict[str, Any]]:
    """Entries {question_id, question, image, image_id, dataset, answer?}; images are named as in COCO."""
    folder = field(content, "data_subtype", str, path).replace("test-dev", "test")
    seen: set[Identifier] = set()
    entries = []
    for number, question in enumerate(objects(content, "questions", path)):
        where = f"{path}: questions.{number}"
        identifier = field(question, "question_id", (int, str), where)
        if identifier in seen:
            raise DataError(f"{where}: question_id {identifier} occurs twice")
        seen.add(identifier)
        image = field(question, "image_id", int, where)
        entry = {
            "question_id": identifier,
            "question": field(question, "question", str, where),
            "image": f"{folder}/COCO_{folder}_{image:012d}.jpg",
            "image_id": image,
            "dataset": "vqa",
        }
        if answers is not None and identifier in answers:
            entry["answer"] = answers[identifier]
        elif answers is not None:
            notes.add("questions without an annotation", f"questions.{number}")
        entries.append(entry)
    return entries


def _read_annotations(paths: tuple[str, ...]) -> dict[Identifier, list[str]] | None:
    """The answers in VQA's own annotations, by question. Raises DataError, also for a question that is
    annotated twice."""
    if not paths:
        return None
    answers: dict[Identifier, list[str]] = {}
    for path in files.expand(paths):
        for number, annotation in enumerate(objects(read_json(path, dict), "annotations", path)):
            where = f"{path}: annotations.{number}"
            identifier = field(annotation, "question_id", (int, str), where)
            if identifier in answers:
                raise DataError(f"{where}: question_id {identifier} is annotated twice")
            answers[identifier] = _all_answers(field(annotation, "answers", list, where), where)
    return answers


def _count_unused(
    answers: dict[Identifier, list[str]],
    rows: tuple[Rows, ...],
    paths: list[str],
    options: TaskJson,
    notes: Notes,
) -> None:
    asked = {part[number]["question_id"] for part in rows for number in range(len(part))}
    if not asked & answers.keys():
        raise DataError(
            f"no question of {', '.join(paths)} is annotated in {', '.join(options.annotations)}; "
            "do the files belong together?"
        )
    notes.add("annotations without a question", count=len(answers.keys() - asked))


# --------------------------------------------------------------------------------------------- entries


def _grouped(rows: Rows, path: str) -> list[dict[str, Any]]:
    """One entry per image, in the order of their first captions. Raises DataError for entries that are no
    captions."""
    images: dict[str, dict[str, Any]] = {}
    for number in range(len(rows)):
        where, entry = f"{path}: entry {number}", _row(rows, number, path)
        if kind_of(entry, where) != "caption":
            raise DataError(
                f"{where}: group_captions joins captions only, this entry is of kind {kind_of(entry, where)}"
            )
        caption = field(entry, "caption", (str, list), where)
        kept = images.setdefault(field(entry, "image", str, where), {**entry, "caption": []})
        kept["caption"] += [caption] if isinstance(caption, str) else caption
    return list(images.values())


def is_task_list(beginning: Beginning) -> bool:
    """Whether a file is a JSON list, lines of a task, or VQA's own questions."""
    value = beginning.value
    if not isinstance(value, dict):
        return isinstance(value, list)
    keys = value.keys()
    if {"elems", "binary", "image_rpath", "annotations"} & keys:
        return False
    tasks = {"caption", "question", "sentence", "text"}
    return (
        isinstance(value.get("questions"), list)
        or _is_official_nlvr(value)
        or _is_official_entailment(value)
        or ("image" in keys and bool(tasks & keys))
        or ("images" in keys and "sentence" in keys)
    )


def _is_official_nlvr(entry: dict[str, Any]) -> bool:
    return "identifier" in entry and "sentence" in entry and not {"image", "images"} & entry.keys()


def _is_official_entailment(entry: dict[str, Any]) -> bool:
    return "Flickr30K_ID" in entry and "sentence2" in entry


def kind_of(entry: dict[str, Any], where: str) -> str:
    """caption, vqa, nlvr, ve or refcoco. Raises DataError for anything else."""
    if "question" in entry:
        return "vqa"
    if _is_official_entailment(entry):
        return "ve"
    if "sentence" in entry:
        return "nlvr" if "images" in entry or _is_official_nlvr(entry) else "ve"
    if "text" in entry:
        return "refcoco"
    if "caption" in entry:
        return "caption"
    raise DataError(
        f"{where}: cannot tell what this entry is from its fields {', '.join(sorted(entry))}; "
        "expected one of caption, question, sentence, text"
    )


def _plain(entry: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """An official entry of NLVR2 or SNLI-VE with the fields of a list; other entries as they are."""
    if kind == "nlvr" and _is_official_nlvr(entry):
        # train-I-J-K is sentence K about the pair J of set I.
        name = field(entry, "identifier", str, where)
        split, pair = name.partition("-")[0], name.rpartition("-")[0]
        folder = split
        if entry.get("directory") is not None:
            folder = f"images/{split}/{field(entry, 'directory', (int, str), where)}"
        return {**entry, "images": [f"{folder}/{pair}-img{number}.png" for number in (0, 1)]}
    if kind == "ve" and _is_official_entailment(entry):
        plain = {
            **entry,
            "image": str(field(entry, "Flickr30K_ID", (int, str), where)),
            "sentence": field(entry, "sentence2", str, where),
            "label": entry.get("gold_label"),
        }
        if entry.get("pairID") is not None:
            plain["identifier"] = field(entry, "pairID", str, where)
        return plain
    return entry


def parse_entry(entry: dict[str, Any], path: str, row: int, options: TaskJson) -> Sample:
    """One entry; `row` counts from 0. Raises DataError naming file, entry and field."""
    where = f"{path}: entry {row}"
    kind = kind_of(entry, where)
    entry = _plain(entry, kind, where)
    root = options.dataset_roots.get(str(entry.get("dataset", "")), options.root)
    paired = kind == "nlvr"
    names = strings(entry, "images", where) if paired else [field(entry, "image", str, where)]
    if kind == "ve":
        names = [name if posixpath.splitext(name)[1] else f"{name}.jpg" for name in names]
    identifier = optional_id(entry, "image_id", where)
    images = tuple(
        image_at(
            name,
            root=root,
            prefixes=options.prefixes,
            schemes=options.schemes,
            id=stem(name) if identifier is None else identifier,
        )
        for name in names
    )
    texts, target = _content(entry, kind, where)
    texts += concepts(entry, "kwords", where)
    for image, name in enumerate(("kwords1", "kwords2")):
        texts += concepts(entry, name, where, image=image)
    known = {
        "image",
        "images",
        "caption",
        "question",
        "sentence",
        "text",
        "answer",
        "label",
        "kwords",
        "kwords1",
        "kwords2",
    }
    meta = {"file": shown(path), "row": row, **{k: v for k, v in entry.items() if k not in known}}
    return Sample(key=f"{path}:{row}", images=images, texts=texts, target=target, meta=meta)


def _content(entry: dict[str, Any], kind: str, where: str) -> tuple[tuple[Text, ...], Target | None]:
    match kind:
        case "caption":
            return _texts(field(entry, "caption", (str, list), where), "caption", where), None
        case "vqa":
            question = Text(
                text=field(entry, "question", str, where),
                role="question",
                id=optional_id(entry, "question_id", where),
            )
            return (question,), _answers(entry, where)
        case "refcoco":
            expression = Text(
                text=field(entry, "text", str, where),
                role="expression",
                id=optional_id(entry, "ref_id", where),
            )
            return (expression,), None
        case _:
            role: Role = "sentence" if kind == "nlvr" else "hypothesis"
            labels = NLVR_LABELS if kind == "nlvr" else ENTAILMENT_LABELS
            text = Text(
                text=field(entry, "sentence", str, where),
                role=role,
                id=optional_id(entry, "identifier", where),
            )
            return (text,), _label(entry.get("label"), labels, where)


def _label(label: Any, labels: dict[str, int], where: str) -> Target | None:
    if isinstance(label, bool) and str(label) in labels:
        label = str(label)
    if label is None or (isinstance(label, str) and label in _UNLABELLED):
        return None
    if not isinstance(label, str) or label not in labels:
        raise DataError(f"{where}: `label` must be one of {', '.join(labels)}, found {short(label)}")
    return Target(label=labels[label])


def _texts(value: str | list[Any], role: Role, where: str) -> tuple[Text, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: `caption` must be a string or a list of strings, found {short(value)}")
    return tuple(Text(text=text, role=role, listed=isinstance(value, list)) for text in texts)


def _answers(entry: dict[str, Any], where: str) -> Target | None:
    """Distinct answers weighted by their share; a single string (Visual Genome) weighs one half."""
    answer = entry.get("answer")
    if answer is None or answer == []:
        return None
    if not isinstance(answer, list):
        text = _answer(answer, where)
        return Target(answers=((text, VISUAL_GENOME_WEIGHT),), raw_answers=(text,))
    answers = _all_answers(answer, where)
    counts = Counter(answers)
    weights = tuple((text, count / len(answers)) for text, count in counts.items())
    return Target(answers=weights, raw_answers=tuple(answers))


def _all_answers(values: list[Any], where: str) -> list[str]:
    """Answers as a list gives them, or as VQA's own annotations do: objects with a field `answer`."""
    return [
        _answer(field(value, "answer", (str, int, float), where) if isinstance(value, dict) else value, where)
        for value in values
    ]


def _answer(value: Any, where: str) -> str:
    """An answer as text; a number that was written without quotes as its digits."""
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and is_finite([value]):
        return str(value)
    raise DataError(f"{where}: `answer` must be a string or a list of strings, found {short(value)}")
