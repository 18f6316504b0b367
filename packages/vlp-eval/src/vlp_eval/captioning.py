"""Captions: written by beam search, judged as COCO's are.

Source: COCO captions on the Karpathy split; X-VLM `Captioning.py`, specification 4.7 and 6.6; metrics of
pycocoevalcap 1.2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from vlp_data.errors import DataError
from vlp_data.examples import prompt_ids
from vlp_data.schema import Identifier, Sample, Source
from vlp_data.sources.rows import read_json

from vlp_eval.benchmarks.captioning import CaptioningFiles, CaptioningOptions
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
from vlp_eval.metrics import captioning as metric
from vlp_eval.report import Scores
from vlp_eval.subject import Subject

PROMPT = "a picture of "
"""What X-VLM's captions begin with."""


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """What captioning is measured on."""

    source: Source
    """Rows of one image; rows of one image file are one image."""
    references: Mapping[Identifier, Sequence[str]] | None = None
    """What people wrote, by image id (the number in the file name where the source gives none); None takes
    the captions of the rows. Where there are none, the result has no numbers."""


def open_captions(source: Source, files: CaptioningFiles, options: CaptioningOptions) -> Captioned:
    """The images with their references. Raises FileNotFoundError, DataError for the file."""
    return Captioned(
        source=source, references=read_references(files.references) if files.references else None
    )


class _Image(NamedTuple):
    name: str
    id: Identifier
    captions: tuple[str, ...]


@dataclass(frozen=True)
class _Chosen:
    """The first row of each image of a source."""

    source: Source
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.rows[index]]

    def describe(self) -> dict[str, Any]:
        return self.source.describe()


@torch.no_grad()
def evaluate_captioning(
    subject: Subject, data: Captioned, options: CaptioningOptions, execution: Execution = EXECUTION
) -> Scores:
    """Write one caption for every image of a source, and judge it by BLEU, ROUGE-L and CIDEr.

    Args:
        subject: Its model is a `vlp_eval.protocol.Captioner`. The prompt, which is not part of a caption, is
            `options.prompt`, or else `subject.settings["prompt"]`, or else `PROMPT`.
        data: The images. CIDEr depends on which are judged together, so on `options.limit`.
        options: How captions are written and measured.
        execution: How the evaluation runs.

    Raises:
        DataError: A row without image, or two images with one id; ValueError: settings that cannot take
            effect, an image that cannot be opened, references missing.
    """
    model, (tokenizer, _) = subject.model, subject.text()
    require_fit(model, subject.concepts)
    rows = read(data.source, _image, options.limit, subject.concepts)
    images = _grouped(rows)
    require_unique((one.id for one in images.values()), "image")
    truth = _references(list(images.values()), data.references)
    if options.java and truth is None:
        raise ValueError(f"java={list(options.java)} has no effect without references")
    prompt = subject.settings.get("prompt", PROMPT) if options.prompt is None else options.prompt
    start = prompt_ids(tokenizer, prompt)
    if options.max_tokens <= len(start):
        raise ValueError(
            f"max_tokens={options.max_tokens} counts the {len(start)} tokens that the prompt {prompt!r} "
            "takes; give more"
        )

    def run(chosen: Sequence[int], batch: ImageBatch) -> list[str]:
        embeds, visible = model.vision.encode(batch.images)
        written = model.generate(
            embeds,
            torch.tensor([start] * len(chosen), device=embeds.device),
            beams=options.beams,
            max_tokens=options.max_tokens,
            min_tokens=options.min_tokens,
            length_penalty=options.length_penalty,
            end_id=tokenizer.sep_id,
            pad_id=tokenizer.pad_id,
            image_mask_BL=visible,
        )
        return [tokenizer.decode(ids[len(start) :]).strip() for ids in written.ids.tolist()]

    first: dict[str, int] = {}
    for number, row in enumerate(rows):
        first.setdefault(row.name, number)
    chosen = _Chosen(data.source, tuple(first.values()))
    captions = evaluate_rows(subject, chosen, len(first), run, options, execution, what="captions")
    written = {one.id: text for one, text in zip(images.values(), captions, strict=True)}
    settings = {
        "prompt": prompt,
        "beams": options.beams,
        "max_tokens": options.max_tokens,
        "min_tokens": options.min_tokens,
        "length_penalty": options.length_penalty,
        **settings_of(subject, execution),
    }
    return _scores(written, truth, options.java, settings)


def read_references(path: str) -> dict[Identifier, list[str]]:
    """By image id: the captions of a file in COCO's format (coco_karpathy_test_gt.json). Raises
    FileNotFoundError, DataError."""
    found: dict[Identifier, list[str]] = {}
    try:
        for one in read_json(path, dict)["annotations"]:
            found.setdefault(one["image_id"], []).append(one["caption"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of COCO captions: {error!r}") from error
    return found


def _image(sample: Sample) -> _Image:
    if len(sample.images) != 1:
        raise DataError(f"{sample.key}: captioning needs rows of one image")
    image = sample.images[0]
    number = sample.key if image.id is None else image.id
    if isinstance(number, str) and (tail := number.rsplit("_", 1)[-1]).isdigit():
        number = int(tail)  # COCO_val2014_000000391895: the server knows images by number
    captions = tuple(text.text for text in sample.texts if text.role == "caption")
    return _Image(image.path or sample.key, number, captions)


def _grouped(rows: Sequence[_Image]) -> dict[str, _Image]:
    found: dict[str, _Image] = {}
    for row in rows:
        known = found.get(row.name)
        found[row.name] = row if known is None else known._replace(captions=known.captions + row.captions)
    return found


def _references(
    images: Sequence[_Image], given: Mapping[Identifier, Sequence[str]] | None
) -> dict[Identifier, Sequence[str]] | None:
    if given is not None:
        missing = [one.id for one in images if one.id not in given]
        if missing:
            raise ValueError(f"{len(missing)} images have no references, the first is {missing[0]!r}")
        return {one.id: given[one.id] for one in images}
    bare = [one.id for one in images if not one.captions]
    if bare and len(bare) < len(images):
        raise ValueError(
            f"{len(bare)} of {len(images)} images have no caption to compare with, such as {bare[0]!r}"
        )
    return None if bare else {one.id: one.captions for one in images}


def _scores(
    written: Mapping[Identifier, str],
    truth: Mapping[Identifier, Sequence[str]] | None,
    java: Sequence[str],
    settings: dict[str, Any],
) -> Scores:
    samples: list[dict[str, Any]] = [{"id": one, "caption": text} for one, text in written.items()]
    counts = {"images": len(written)}
    if truth is None:
        return Scores(
            benchmark="captioning",
            settings=settings,
            counts=counts,
            results={},
            hits={},
            samples={"images": samples},
            notes=("the images come without captions of people: no numbers, only the file of captions",),
        )
    total, each = metric.scores(written, truth)
    if java:
        from vlp_eval.metrics.java import judge

        for name, corpus in judge(written, truth, java).items():
            total[name] = corpus.value
            for one, value in zip(truth, corpus.each, strict=True):
                each[one][name] = value
    for sample in samples:
        sample |= {name: round(value, 6) for name, value in each[sample["id"]].items()}
        sample["references"] = list(truth[sample["id"]])
    left = [name for name in ("meteor", "spice") if name not in java]
    notes = ["CIDEr and BLEU are numbers of this set of images; those of a part of it cannot be compared"]
    if left:
        notes.append(f"not computed: {' and '.join(left)} (java={left} with the extra caption-java)")
    return Scores(
        benchmark="captioning",
        settings=settings,
        counts={**counts, "references": sum(map(len, truth.values()))},
        results={"written": {name: 100 * value for name, value in total.items()}},
        hits={},
        samples={"images": samples},
        notes=tuple(notes),
    )
