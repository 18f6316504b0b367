"""What was predicted, in the file that a public server or an official script takes, in order of the data."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlp_eval.report import Scores


def answers(scores: Scores, folder: Path) -> Path:
    """vqa_result.json: [{"question_id", "answer"}], as EvalAI takes it."""
    rows = [{"question_id": one["id"], "answer": one["answer"]} for one in scores.samples["questions"]]
    return write_json(folder / "vqa_result.json", rows)


def captions(scores: Scores, folder: Path) -> Path:
    """captions.json: [{"image_id", "caption"}], as COCO's server takes it."""
    rows = [{"image_id": one["id"], "caption": one["caption"]} for one in scores.samples["images"]]
    return write_json(folder / "captions.json", rows)


def sentence_labels(scores: Scores, folder: Path) -> Path:
    """nlvr.csv: lines identifier,prediction, as the script of lil-lab/nlvr takes it."""
    return write_csv(
        folder / "nlvr.csv", ((one["id"], one["predicted"]) for one in scores.samples["statements"])
    )


def hypothesis_labels(scores: Scores, folder: Path) -> Path:
    """entailment_labels.json: [{"id", "label"}]."""
    rows = [{"id": one["id"], "label": one["predicted"]} for one in scores.samples["statements"]]
    return write_json(folder / "entailment_labels.json", rows)


def boxes(scores: Scores, folder: Path) -> Path:
    """grounding_boxes.json: [{"id", "bbox": [x, y, w, h] in pixels, or null}]."""
    rows = [{"id": one["id"], "bbox": one["predicted"]} for one in scores.samples["expressions"]]
    return write_json(folder / "grounding_boxes.json", rows)


def write_json(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as a JSON list; returns the file."""
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return path


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> Path:
    """Write rows as lines of values with commas between; returns the file."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)
    return path
