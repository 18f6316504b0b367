"""Every field of every format, replaced by what files in the wild hold: a DataError when the file is opened,
or samples that are used or counted; never anything else."""

import base64
import contextlib
import copy
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from vlp_data.errors import BadSample, DataError
from vlp_data.examples import (
    BoxExamples,
    CaptionExamples,
    EntailmentExamples,
    ImageTextExamples,
    NlvrExamples,
    RegionExamples,
    RetrievalExamples,
    VqaExamples,
)
from vlp_data.loader import Loader
from vlp_data.options import (
    CocoCaptions,
    CocoInstances,
    ImageTextLines,
    Karpathy,
    MaskingOptions,
    Refer,
    RegionLines,
    RegionOptions,
    Squash,
    TaskJson,
    TextOptions,
    VisualGenome,
)
from vlp_data.sources.given import detect
from vlp_data.tools import inspect


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


REMOVED = object()
HOSTILE = [
    REMOVED,
    None,
    True,
    0,
    -1,
    1e300,
    10**30,
    float("nan"),
    float("inf"),
    "",
    " ",
    "41",
    "a\0b",
    "half \ud83d of one",
    "\x1b[31mred",
    "~nosuchuser/a.jpg",
    "nosuch://a/b.jpg",
    "reference://::list.json",
    "zip://a.jpg::memory://x.zip",
    "https://[::1/a.jpg",
    "a" * 300,
    "!base64!",
    "caf\u00e9",
    [],
    {},
    [None],
    ["a", 3],
    [1, 2],
    [float("nan")] * 4,
    ["1", "2", "3", "4"],
    [0.1, 0.1, 0.5, 0.4],
    [500, 500, 3, 3],
    {"answer": 3},
    {"size": [0, 0], "counts": "x"},
    [[1, 2, "3"]],
    _deep(200),
]


def _picture() -> bytes:
    stream = io.BytesIO()
    Pillow.new("RGB", (60, 40), (200, 30, 30)).save(stream, "PNG")
    return stream.getvalue()


IMAGE = base64.b64encode(_picture()).decode()
COCO = {
    "licenses": [{"id": 1, "name": "cc"}],
    "images": [{"id": n, "file_name": "a.png", "width": 60, "height": 40, "license": 1} for n in (1, 2)],
    "categories": [{"id": 1, "name": "dog"}],
    "annotations": [
        {
            "id": n,
            "image_id": n,
            "category_id": 1,
            "bbox": [1, 2, 30, 20],
            "caption": "a dog",
            "area": 600,
            "iscrowd": 0,
            "segmentation": [[1, 2, 30, 2, 30, 20]],
        }
        for n in (1, 2)
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "",
            "filename": "a.png",
            "cocoid": n,
            "split": "train",
            "sentences": [{"raw": "a dog", "sentid": n}],
        }
        for n in (1, 2)
    ],
}
SIZES = [
    {"image_id": n, "width": 60, "height": 40, "url": "https://x/VG_100K/1.jpg", "coco_id": None}
    for n in (1, 2)
]
OBJECTS = [
    {
        "image_id": n,
        "objects": [
            {"object_id": n, "x": 1, "y": 2, "w": 30, "h": 20, "names": ["dog"], "attributes": ["red"]}
        ],
    }
    for n in (1, 2)
]
REFS = [
    {"ref_id": n, "ann_id": n, "image_id": n, "split": "val", "category_id": 1, "sentences": []}
    for n in (1, 2)
]
EXPRESSIONS = [{"image": "a.png", "text": "a dog", "ref_id": n, "kwords": ["dog"]} for n in (1, 2)]
VLUE = [{**EXPRESSIONS[0], "bbox": [1, 2, 30, 20], "dets": [[1, 2, 3, 4]], "width": 60, "height": 40}] * 2
DETECTIONS = {str(n): [[1, 2, 3, 4, 0.9]] for n in (1, 2)}
QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [{"question_id": n, "image_id": n, "question": "a dog?"} for n in (1, 2)],
}
ANSWERS = {
    "annotations": [
        {"question_id": n, "answers": [{"answer": "red", "answer_id": k} for k in (1, 2)]} for n in (1, 2)
    ]
}
NLVR = [{"sentence": "a dog", "identifier": f"dev-{n}-0-0", "label": "True"} for n in (1, 2)]
ENTAILMENT = [
    {"Flickr30K_ID": f"{n}", "pairID": f"{n}.jpg#2r1c", "gold_label": "neutral", "sentence2": "a dog"}
    for n in (1, 2)
]

Files = dict[str, tuple[Any, bool]]
"""Name of a file -> (its value, whether it is written as lines)."""

FORMATS: dict[str, tuple[Files, Any, str]] = {
    "coco_captions": (
        {"list.json": (COCO, False)},
        CocoCaptions(annotations="list.json", images=""),
        "captions",
    ),
    "coco_instances": (
        {"list.json": (COCO, False)},
        CocoInstances(annotations="list.json", images="", captions="list.json"),
        "regions",
    ),
    "karpathy": (
        {"list.json": (KARPATHY, False)},
        Karpathy(annotations="list.json", images="", split="train"),
        "captions",
    ),
    "visual_genome": (
        {"list.json": (OBJECTS, False), "sizes.json": (SIZES, False)},
        VisualGenome(annotations="list.json", image_data="sizes.json", image_name="a.png"),
        "regions",
    ),
    "refer": (
        {
            "list.json": (EXPRESSIONS, False),
            "refs.json": (REFS, False),
            "instances.json": (COCO, False),
            "dets.json": (DETECTIONS, False),
        },
        Refer(files=("list.json",), refs="refs.json", instances="instances.json", detections="dets.json"),
        "boxes",
    ),
    "vlue": ({"list.json": (VLUE, False)}, Refer(files=("list.json",)), "boxes"),
    "captions": (
        {"list.json": ([{"image": "a.png", "caption": ["a dog"], "image_id": 1}] * 2, False)},
        TaskJson(files=("list.json",)),
        "captions",
    ),
    "vqa": (
        {"list.json": ([{"image": "a.png", "question": "a dog?", "answer": ["red", "cat"]}] * 2, False)},
        TaskJson(files=("list.json",)),
        "questions",
    ),
    "vqa_official": (
        {"list.json": (QUESTIONS, False), "answers.json": (ANSWERS, False)},
        TaskJson(files=("list.json",), annotations=("answers.json",)),
        "questions",
    ),
    "nlvr": (
        {"list.json": ([{"images": ["a.png", "a.png"], "sentence": "a dog", "label": "True"}] * 2, False)},
        TaskJson(files=("list.json",)),
        "sentences",
    ),
    "nlvr_official": ({"list.json": (NLVR, True)}, TaskJson(files=("list.json",)), "sentences"),
    "entailment_official": ({"list.json": (ENTAILMENT, True)}, TaskJson(files=("list.json",)), "hypotheses"),
    "lines": (
        {"list.json": ([{"caption": ["a dog"], "image_rpath": "a.png", "kwords": ["cat"]}] * 2, True)},
        ImageTextLines(files=("list.json",)),
        "captions",
    ),
    "regions": (
        {
            "list.json": (
                [
                    {
                        "elems": [{"caption": "a dog", "bb": [1, 2, 30, 20], "attributes": ["red"]}],
                        "caption": "a cat",
                        "binary": IMAGE,
                        "width": 60,
                        "height": 40,
                    }
                ]
                * 2,
                True,
            )
        },
        RegionLines(files=("list.json",)),
        "regions",
    ),
}


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value; of lists the first and the second item."""
    found = [at]
    parts = (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    )
    for key, part in parts:
        found += _places(part, (*at, key))
    return found


def _mutated(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return {} if new is REMOVED else new
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if new is REMOVED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return value


def _written(value: Any, lines: bool) -> str:
    if lines and isinstance(value, list):
        return "".join(json.dumps(row) + "\n" for row in value)
    return json.dumps(value)


def _examples(kind: str, source: Any, tokenizer: Any) -> list[Any]:
    view, masking = Squash(size=32, augment=False), MaskingOptions(max_masks=2)
    common = {"source": source, "tokenizer": tokenizer, "image": view, "text": TextOptions(max_tokens=8)}
    regions = {"masking": masking, "batch_texts": 4, "patch_size": 16}
    match kind:
        case "captions":
            return [
                ImageTextExamples(**common, masking=masking),
                RetrievalExamples(**common),
                CaptionExamples(**common | {"text": TextOptions(max_tokens=8, separator=True)}, prompt="a "),
            ]
        case "regions":
            return [
                RegionExamples(**common, **regions),
                RegionExamples(**common, **regions, regions=RegionOptions(crop="none")),
            ]
        case "boxes":
            return [BoxExamples(**common)]
        case "questions":
            return [VqaExamples(**common)]
        case "sentences":
            return [NlvrExamples(**common)]
        case _:
            return [EntailmentExamples(**common)]


def _opened(options: Any) -> tuple[Any, str]:
    try:
        return options.open(), ""
    except DataError as error:
        return None, str(error)


def read_all(options: Any, kind: str, tokenizer: Any) -> None:
    """Open, look at and train on a source: DataErrors are fine, and BadSamples where they are counted."""
    with contextlib.suppress(DataError):
        detect(("list.json",))
    source, refused = _opened(options)
    if source is None:
        assert ".json" in refused and refused.isprintable()
        return
    json.dumps(source.describe())
    assert all(line.isprintable() for line in inspect(source).lines())
    for examples in _examples(kind, source, tokenizer):
        for number in range(len(source)):
            with contextlib.suppress(BadSample):
                made = examples.example(number, random.Random(0))
                with contextlib.suppress(DataError):
                    examples.collate([made], random.Random(0))
        with contextlib.suppress(DataError), Loader(examples, global_batch=2, seed=0) as loader:
            next(loader)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(_picture())
    for name in ("dev", "val2014"):
        (tmp_path / name).mkdir()
    for name in (
        *(f"dev/dev-{n}-0-img{k}.png" for n in (1, 2) for k in (0, 1)),
        *(f"{n}.jpg" for n in (1, 2)),
        *(f"val2014/COCO_val2014_{n:012d}.jpg" for n in (1, 2)),
    ):
        (tmp_path / name).write_bytes(_picture())
    return tmp_path


def _lay(files: Files, changes: dict[str, str]) -> None:
    for name, (value, lines) in files.items():
        Path(name).write_text(changes.get(name) or _written(value, lines))


@pytest.mark.parametrize("format", FORMATS)
def test_the_files_are_good_before(folder, tokenizer, format):
    files, options, kind = FORMATS[format]
    _lay(files, {})
    source = options.open()
    report = inspect(source)
    assert (report.usable, dict(report.counts)) == (2, {})
    for examples in _examples(kind, source, tokenizer):
        with Loader(examples, global_batch=2, seed=0) as loader:
            next(loader)
            assert not loader.bad


@pytest.mark.parametrize("format", FORMATS)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_field_can_do_more_than_be_refused_or_counted(folder, tokenizer, format, data):
    files, options, kind = FORMATS[format]
    name = data.draw(st.sampled_from(sorted(files)))
    value, lines = files[name]
    place = data.draw(st.sampled_from(_places(value)))
    new = data.draw(st.sampled_from(HOSTILE))
    _lay(files, {name: _written(_mutated(value, place, new), lines)})
    read_all(options, kind, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_every_field_with_every_value(folder, tokenizer, format):
    files, options, kind = FORMATS[format]
    for name, (value, lines) in files.items():
        for place in _places(value):
            for new in HOSTILE:
                _lay(files, {name: _written(_mutated(value, place, new), lines)})
                try:
                    read_all(options, kind, tokenizer)
                except Exception as error:
                    error.add_note(f"{name} {place} {new!r:.80}")
                    raise


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "written", ["", "[", "{", "null", "3", "[" * 100_000, '{"a":' * 100_000, "\ufeff[]", "\0"]
)
def test_no_file_can(folder, tokenizer, format, written):
    files, options, kind = FORMATS[format]
    for name in files:
        _lay(files, {})
        Path(name).write_text(written)
        read_all(options, kind, tokenizer)


@pytest.mark.parametrize("format", FORMATS)
def test_lists_as_lines_and_lines_as_lists(folder, tokenizer, format):
    files, options, kind = FORMATS[format]
    for name, (value, lines) in files.items():
        if isinstance(value, list):
            _lay(files, {name: _written(value, not lines)})
            read_all(options, kind, tokenizer)
