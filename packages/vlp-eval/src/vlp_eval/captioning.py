"""Captions: written by beam search, judged as COCO's are.

Source: COCO captions on the Karpathy split; X-VLM `Captioning.py`, specification 4.7 and 6.6; metrics of
pycocoevalcap 1.2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from vlp_data.errors import DataError
from vlp_data.examples import prompt_ids
from vlp_data.schema import Identifier, Sample, Source
from vlp_data.sources.rows import read_json
from vlp_data.text import Tokenizer

from vlp_eval.concepts import require_fit
from vlp_eval.inference import ImageBatch, RowOptions, evaluate_rows, read, require_unique
from vlp_eval.metrics import captioning as metric
from vlp_eval.protocol import Captioner
from vlp_eval.report import Scores

JavaMetric = Literal["meteor", "spice"]

PROMPT = "a picture of "
"""What X-VLM's captions begin with."""


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
    model: Captioner,
    source: Source,
    tokenizer: Tokenizer,
    options: RowOptions,
    *,
    prompt: str = PROMPT,
    beams: int = 3,
    max_tokens: int = 20,
    min_tokens: int = 5,
    length_penalty: float = 1.0,
    references: Mapping[Identifier, Sequence[str]] | None = None,
    java: Sequence[JavaMetric] = (),
) -> Scores:
    """Write one caption for every image of a source, and judge it by BLEU, ROUGE-L and CIDEr.

    Args:
        model: Writes captions.
        source: Rows of one image; rows of one image file are one image.
        tokenizer: The model's.
        options: How rows are read. CIDEr depends on which images are judged together, so on `limit`.
        prompt: What a caption begins with; not part of the result.
        beams: Of the search.
        max_tokens: Longest caption in tokens, the prompt's included.
        min_tokens: Shortest caption, the same way.
        length_penalty: Exponent of the length by which sums of log-probabilities are divided.
        references: What people wrote, by image id (the number in the file name where the source gives none);
            None takes the captions of the rows. Where there are none, the result has no numbers.
        java: Metrics besides that need Java and the extra `vlp-eval[caption-java]`.

    Raises:
        DataError: A row without image, or two images with one id; ValueError: settings that cannot take
            effect, an image that cannot be opened, references missing.
    """
    require_fit(model, options.concepts)
    rows = read(source, _image, options)
    images = _grouped(rows)
    require_unique((one.id for one in images.values()), "image")
    truth = _references(list(images.values()), references)
    if java and truth is None:
        raise ValueError(f"java={list(java)} has no effect without references")
    start = prompt_ids(tokenizer, prompt)
    if max_tokens <= len(start):
        raise ValueError(
            f"max_tokens={max_tokens} counts the {len(start)} tokens that the prompt {prompt!r} takes; give more"
        )

    def run(chosen: Sequence[int], batch: ImageBatch) -> list[str]:
        written = model.generate(
            model.vision(batch.image.squeeze(1), *batch.given),
            torch.tensor([start] * len(chosen), device=batch.image.device),
            beams=beams,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            length_penalty=length_penalty,
            end_id=tokenizer.sep_id,
            pad_id=tokenizer.pad_id,
        )
        return [tokenizer.decode(ids[len(start) :]).strip() for ids in written.ids.tolist()]

    first: dict[str, int] = {}
    for number, row in enumerate(rows):
        first.setdefault(row.name, number)
    captions = evaluate_rows(
        model,
        _Chosen(source, tuple(first.values())),
        len(first),
        run,
        options,
        tokenizer=tokenizer,
        what="captions",
    )
    written = {one.id: text for one, text in zip(images.values(), captions, strict=True)}
    settings = {
        "prompt": prompt,
        "beams": beams,
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "length_penalty": length_penalty,
        **options.settings(),
    }
    return _scores(written, truth, java, settings)


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
    java: Sequence[JavaMetric],
    settings: dict[str, Any],
) -> Scores:
    samples: list[dict[str, Any]] = [{"id": one, "caption": text} for one, text in written.items()]
    counts = {"images": len(written)}
    if truth is None:
        return Scores(
            benchmark="captioning",
            settings=settings,
            counts=counts,
            stages={},
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
        stages={"written": {name: 100 * value for name, value in total.items()}},
        hits={},
        samples={"images": samples},
        notes=tuple(notes),
    )
