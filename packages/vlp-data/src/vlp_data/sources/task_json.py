"""Task lists of ALBEF, X-VLM and ViCHA: one JSON list of objects per file.

The fields of an entry say what it is:
  {image, caption: str | [str], image_id?, kwords?}        captions (pre-training, retrieval, captioning)
  {image, question, answer?: str | [str], dataset?, ...}   VQA and Visual Genome questions
  {images: [a, b], sentence, label}                        NLVR2
  {image, sentence, label}                                 SNLI-VE (image without extension)
  {image, text, ref_id}                                    RefCOCO+ expressions
Source: data specification 1.3; X-VLM specification 5.5.
"""

import dataclasses
import posixpath
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vlp_data import files
from vlp_data.errors import BadSample, DataError
from vlp_data.paths import rebase
from vlp_data.roots import FolderText, PathText
from vlp_data.schema import Image, Role, Sample, Target, Text
from vlp_data.sources import Beginning
from vlp_data.sources.rows import Rows, concepts, field, read_json

if TYPE_CHECKING:
    import numpy as np

NLVR_LABELS = {"False": 0, "True": 1}
ENTAILMENT_LABELS = {"contradiction": 0, "neutral": 1, "entailment": 2}
VISUAL_GENOME_WEIGHT = 0.5


@dataclass(frozen=True, kw_only=True)
class TaskJson:
    """ALBEF-type lists in .json files; the fields of an entry tell what it is (caption, vqa, nlvr, ve,
    refcoco)."""

    format: Literal["task_json"] = "task_json"
    files: tuple[PathText, ...]
    """JSON files, each one list of objects; paths or fsspec URLs."""
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
        kinds = Counter(
            kind_of(rows[0], path) for path, rows in zip(self.paths, self.rows, strict=True) if len(rows)
        )
        return {
            "format": self.options.format,
            "files": list(self.paths),
            "rows": len(self),
            "kinds": dict(kinds),
        }


def open_task_json(options: TaskJson) -> TaskJsonSource:
    """Read the lists. Raises FileNotFoundError; DataError when a file is no list, an entry of unknown kind
    leads it, or all are empty."""
    import numpy as np

    paths = files.expand(options.files)
    rows = tuple(Rows(_objects(read_json(path, list), path)) for path in paths)
    if not any(map(len, rows)):
        raise DataError(f"no entry in {', '.join(paths)}")
    if options.group_captions:
        rows = tuple(Rows(_grouped(part, path)) for path, part in zip(paths, rows, strict=True))
    for path, part in zip(paths, rows, strict=True):
        if len(part):
            parse_entry(part[0], path, 0, options)
    return TaskJsonSource(options, tuple(paths), rows, np.cumsum([0, *map(len, rows)]))


def _grouped(rows: Rows, path: str) -> list[dict[str, Any]]:
    """One entry per image, in the order of their first captions. Raises DataError for entries that are no
    captions."""
    images: dict[str, dict[str, Any]] = {}
    for number in range(len(rows)):
        where, entry = f"{path}: entry {number}", rows[number]
        if kind_of(entry, where) != "caption":
            raise DataError(
                f"{where}: group_captions joins captions only, this entry is of kind {kind_of(entry, where)}"
            )
        caption = field(entry, "caption", (str, list), where)
        kept = images.setdefault(field(entry, "image", str, where), {**entry, "caption": []})
        kept["caption"] += [caption] if isinstance(caption, str) else caption
    return list(images.values())


def _objects(entries: list[Any], path: str) -> list[dict[str, Any]]:
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{path}: entry {number} must be an object, found {type(entry).__name__}")
    return entries


def is_task_list(beginning: Beginning) -> bool:
    """Whether a file is a JSON list."""
    return isinstance(beginning.value, list)


def kind_of(entry: dict[str, Any], where: str) -> str:
    """caption, vqa, nlvr, ve or refcoco. Raises DataError for anything else."""
    if "question" in entry:
        return "vqa"
    if "sentence" in entry:
        return "nlvr" if "images" in entry else "ve"
    if "text" in entry:
        return "refcoco"
    if "caption" in entry:
        return "caption"
    raise DataError(
        f"{where}: cannot tell what this entry is from its fields {', '.join(sorted(entry))}; "
        "expected one of caption, question, sentence, text"
    )


def parse_entry(entry: dict[str, Any], path: str, row: int, options: TaskJson) -> Sample:
    """One entry; `row` counts from 0. Raises DataError naming file, entry and field."""
    where = f"{path}: entry {row}"
    kind = kind_of(entry, where)
    root = options.dataset_roots.get(str(entry.get("dataset", "")), options.root)
    names = field(entry, "images", list, where) if kind == "nlvr" else [field(entry, "image", str, where)]
    if kind == "ve":
        names = [name if posixpath.splitext(name)[1] else f"{name}.jpg" for name in names]
    identifier = entry.get("image_id")
    images = tuple(
        Image(
            path=rebase(name, prefixes=options.prefixes, root=root),
            id=posixpath.splitext(posixpath.basename(name))[0] if identifier is None else identifier,
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
    meta = {"file": path, "row": row, **{k: v for k, v in entry.items() if k not in known}}
    return Sample(key=f"{path}:{row}", images=images, texts=texts, target=target, meta=meta)


def _content(entry: dict[str, Any], kind: str, where: str) -> tuple[tuple[Text, ...], Target | None]:
    match kind:
        case "caption":
            return _texts(field(entry, "caption", (str, list), where), "caption", where), None
        case "vqa":
            question = Text(
                text=field(entry, "question", str, where), role="question", id=entry.get("question_id")
            )
            return (question,), _answers(entry, where)
        case "refcoco":
            return (
                Text(text=field(entry, "text", str, where), role="expression", id=entry.get("ref_id")),
            ), None
        case _:
            role: Role = "sentence" if kind == "nlvr" else "hypothesis"
            labels = NLVR_LABELS if kind == "nlvr" else ENTAILMENT_LABELS
            label = field(entry, "label", str, where)
            if label not in labels:
                raise DataError(f"{where}: `label` must be one of {', '.join(labels)}, found {label!r}")
            return (Text(text=field(entry, "sentence", str, where), role=role),), Target(label=labels[label])


def _texts(value: str | list[Any], role: Role, where: str) -> tuple[Text, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: `caption` must be a string or a list of strings, found {value!r}"[:300])
    return tuple(Text(text=text, role=role, listed=isinstance(value, list)) for text in texts)


def _answers(entry: dict[str, Any], where: str) -> Target | None:
    """Distinct answers weighted by their share; a single string (Visual Genome) weighs one half."""
    if "answer" not in entry:
        return None
    answer = field(entry, "answer", (str, list), where)
    if isinstance(answer, str):
        return Target(answers=((answer, VISUAL_GENOME_WEIGHT),), raw_answers=(answer,))
    counts = Counter(answer)
    weights = tuple((text, count / len(answer)) for text, count in counts.items())
    return Target(answers=weights, raw_answers=tuple(answer))
