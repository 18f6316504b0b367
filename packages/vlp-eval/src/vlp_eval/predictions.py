"""What was predicted, in the file that the public server or the official script takes."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from vlp_eval.report import Scores


def write(scores: Scores, folder: str | Path) -> Path:
    """Write the predictions of `scores` into a folder; returns the file.

    vqa: vqa_result.json, [{"question_id", "answer"}] (EvalAI); captioning: captions.json, [{"image_id",
    "caption"}] (COCO); nlvr: nlvr.csv, lines identifier,prediction (lil-lab/nlvr); entailment:
    entailment_labels.json, [{"id", "label"}]; grounding: grounding_boxes.json, [{"id", "bbox": [x, y, w, h]
    in pixels, or null}]. In order of the data.

    Raises ValueError for retrieval, whose ranks are in its own report.
    """
    if scores.benchmark not in _WRITERS:
        raise ValueError(f"{scores.benchmark} has no file of predictions; choose among {', '.join(_WRITERS)}")
    name, kind, form = _WRITERS[scores.benchmark]
    rows = [form(sample) for sample in scores.samples[kind]]
    path = Path(folder) / name
    path.write_text(
        _csv(rows) if path.suffix == ".csv" else json.dumps(rows, indent=1) + "\n", encoding="utf-8"
    )
    return path


def _csv(rows: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


_WRITERS: dict[str, tuple[str, str, Any]] = {
    "vqa": ("vqa_result.json", "questions", lambda one: {"question_id": one["id"], "answer": one["answer"]}),
    "captioning": (
        "captions.json",
        "images",
        lambda one: {"image_id": one["id"], "caption": one["caption"]},
    ),
    "nlvr": ("nlvr.csv", "statements", lambda one: (one["id"], one["predicted"])),
    "entailment": (
        "entailment_labels.json",
        "statements",
        lambda one: {"id": one["id"], "label": one["predicted"]},
    ),
    "grounding": (
        "grounding_boxes.json",
        "expressions",
        lambda one: {"id": one["id"], "bbox": one["predicted"]},
    ),
}
