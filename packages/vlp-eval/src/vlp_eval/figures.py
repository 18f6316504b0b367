"""Figures of what a model answered, for a README, a report or a look at what it confuses."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from vlp_data.images import open_image
from vlp_data.schema import Source

from vlp_eval.benchmarks.grounding import WeakGroundingOptions
from vlp_eval.benchmarks.options import BenchmarkOptions
from vlp_eval.concepts import words_of
from vlp_eval.gallery import Gallery
from vlp_eval.grounding import word_heat
from vlp_eval.report import Scores
from vlp_eval.subject import Subject

THUMB, GAP, MARGIN, TEXT_WIDTH = 168, 14, 24, 300
SHOWN = 5
BEST_WIDTH = SHOWN * (THUMB + GAP) - GAP
WIDTH = 2 * MARGIN + TEXT_WIDTH + GAP + BEST_WIDTH
INK, FAINT, RIGHT, WRONG, PAPER, PANEL = "#1b1f24", "#6a737d", "#1a7f37", "#c62828", "#ffffff", "#eef1f4"


def retrieval_figure(
    scores: Scores, gallery: Gallery, options: BenchmarkOptions, subject: Subject | None = None
) -> Image.Image:
    """Texts with their five best images, then images with their five best texts, by the last result of
    `scores`.

    `options.figures` of each kind, spread evenly over the gallery, so that they are neither the best nor the
    worst ones. Right answers have a green frame or green letters and the word "right"; where the right one is
    not among the five, its rank is said. Texts are as the model read them. `gallery` must be the one that
    `scores` is of.
    """
    result = list(scores.results)[-1]
    images, texts = scores.samples["images"], scores.samples["texts"]
    if [one["id"] for one in images] != list(gallery.image_ids) or [one["id"] for one in texts] != list(
        gallery.text_ids
    ):
        raise ValueError("the scores are of another gallery: ids differ")
    place = {name: i for i, name in enumerate(gallery.image_ids)}
    words = {one["id"]: one["text"] for one in texts}
    head = f"{result}: {len(images)} images, {len(texts)} texts"
    blocks = [_heading(f"Text to image, {head}")]
    blocks += [_text_row(texts[j], result, place, gallery) for j in _spread(len(texts), options.figures)]
    blocks += [_heading(f"Image to text, {head}")]
    blocks += [
        _image_row(images[i], result, words, gallery.image(i)) for i in _spread(len(images), options.figures)
    ]
    return _page(blocks)


def samples_figure(
    scores: Scores, data: Any, options: BenchmarkOptions, subject: Subject | None = None
) -> Image.Image:
    """Questions, statements or captions of `scores` beside their images, spread evenly over the data; right
    ones green, wrong ones red.

    `data` must be what `scores` is of: a source, or what holds one as `source`. Captions are not judged one
    by one, so they are black.
    """
    source = getattr(data, "source", data)
    (samples,) = scores.samples.values()
    rows = _rows(scores, source)
    blocks = [_heading(f"{scores.benchmark}: {len(samples)} {next(iter(scores.samples))}")]
    for n in _spread(len(samples), options.figures):
        images = [open_image(image) for image in source[rows[n]].images]
        blocks.append(_sample_row(images, *_lines(samples[n])))
    return _page(blocks)


def grounding_figure(
    scores: Scores, source: Source, options: BenchmarkOptions, subject: Subject | None = None
) -> Image.Image:
    """Expressions with the true box (green) and the predicted one (red)."""
    return _grounding_page(scores, source, options, lambda image, text, words: ())


def heat_figure(
    scores: Scores, source: Source, options: WeakGroundingOptions, subject: Subject
) -> Image.Image:
    """Expressions with the true box (green) and the chosen one (red), and where the model looks for each
    word."""
    return _grounding_page(scores, source, options, partial(word_heat, subject, options=options))


def _grounding_page(
    scores: Scores,
    source: Source,
    options: BenchmarkOptions,
    heat: Callable[[Image.Image, str, Sequence[str]], Sequence[tuple[str, np.ndarray]]],
) -> Image.Image:
    """`heat`: from an image, a text and the words attached to the image to (word, heat [P,P])."""
    samples = scores.samples["expressions"]
    blocks = [_heading(f"{scores.benchmark}: {len(samples)} expressions, true box green, predicted box red")]
    for n in _spread(len(samples), options.figures):
        row = source[n]
        image = open_image(row.images[0])
        blocks.append(_grounding_row(samples[n], image, heat(image, samples[n]["text"], words_of(row))))
    return _page(blocks)


def _page(blocks: Sequence[Image.Image]) -> Image.Image:
    height = 2 * MARGIN + sum(block.height for block in blocks) + GAP * (len(blocks) - 1)
    page = Image.new("RGB", (WIDTH, height), PAPER)
    top = MARGIN
    for block in blocks:
        page.paste(block, (MARGIN, top))
        top += block.height + GAP
    return page


def _rows(scores: Scores, source: Source) -> list[int]:
    """The row of each sample; captions have one sample per image, at the image's first row."""
    if scores.benchmark != "captioning":
        return list(range(len(source)))
    first: dict[str, int] = {}
    for row in range(len(source)):
        sample = source[row]
        first.setdefault(sample.images[0].path or sample.key, row)
    return list(first.values())


def _lines(sample: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """(what was asked, what the model says, its colour, what people say)."""
    if "question" in sample:
        given = ", ".join(dict.fromkeys(sample.get("answers", ())))
        people = f"people: {given}" if given else ""
        colour = INK if "accuracy" not in sample else RIGHT if sample["accuracy"] > 50 else WRONG
        return sample["question"], sample["answer"] or "(nothing)", colour, people
    if "label" in sample:
        colour = RIGHT if sample["label"] == sample["predicted"] else WRONG
        return sample["text"], str(sample["predicted"]), colour, f"in truth: {sample['label']}"
    given = " / ".join(sample.get("references", ()))
    return "", sample["caption"] or "(nothing)", INK, f"people: {given}" if given else ""


def _sample_row(
    images: Sequence[Image.Image], asked: str, said: str, colour: str, people: str
) -> Image.Image:
    block, draw = _canvas(THUMB + 8)
    for n, image in enumerate(images):
        _thumb(block, draw, (n * (THUMB + GAP), 0), image, right=False)
    left = len(images) * (THUMB + GAP)
    width, bottom = block.width - left, 0
    for text, size, fill in ((asked, 20, INK), (said, 20, colour), (people, 16, FAINT)):
        if text:
            bottom = _paragraph(draw, (left, bottom), text, width, _font(size), fill, lines=2) + 8
    return block


def _grounding_row(
    sample: Mapping[str, Any], image: Image.Image, maps: Sequence[tuple[str, np.ndarray]]
) -> Image.Image:
    lines = -(-len(maps) // SHOWN)
    side = TEXT_WIDTH - GAP
    block, draw = _canvas(max(side, 40 + lines * (THUMB + 26)))
    scale = min(side / image.width, side / image.height)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    block.paste(small, (0, 0))
    for box, colour in ((sample["predicted"], WRONG), (sample["box"], RIGHT)):
        if box is not None:
            x, y, w, h = (scale * value for value in box)
            draw.rectangle((x, y, max(x, x + w - 1), max(y, y + h - 1)), outline=colour, width=3)
    told = "right" if sample["right"] else "wrong" if sample["predicted"] else "no detection"
    fill = RIGHT if sample["right"] else WRONG
    end = draw.textlength(f"{told}  ", font=_font(20))
    draw.text((TEXT_WIDTH + GAP, 0), told, font=_font(20), fill=fill)
    _paragraph(
        draw, (int(TEXT_WIDTH + GAP + end), 0), sample["text"], int(BEST_WIDTH - end), _font(20), INK, lines=1
    )
    for n, (word, heat) in enumerate(maps):
        at = (TEXT_WIDTH + GAP + n % SHOWN * (THUMB + GAP), 40 + n // SHOWN * (THUMB + 26))
        _thumb(block, draw, at, heated(_shrunk(image, THUMB), heat), right=False)
        _paragraph(draw, (at[0], at[1] + THUMB + 2), word, THUMB, _font(15), FAINT, lines=1)
    return block


def heated(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The image with the colours of heat [P,P] over it: from blue, where there is little, to red, where there
    is most; plain without heat.

    Each map has a scale of its own, from its least to its most, as in ALBEF's notebook: it says where the
    model looks for a word, not how much. The map is resized (bicubic), smoothed (Gaussian, 0.02 of the longer
    side) and laid over the image with weight heat ** 0.7.
    """
    share = _unit(heat)
    share = np.asarray(Image.fromarray(share).resize(image.size, Image.Resampling.BICUBIC))
    share = _unit(_smooth(share, 0.02 * max(image.size)))
    colour = 255 * np.stack([np.interp(share, *points) for points in _JET], axis=-1)
    weight = share[..., None] ** 0.7
    mixed = (1 - weight) * np.asarray(image.convert("RGB")) + weight * colour
    return Image.fromarray(mixed.round().astype(np.uint8))


_JET = (
    ((0, 0.35, 0.66, 0.89, 1), (0, 0, 1, 1, 0.5)),
    ((0, 0.125, 0.375, 0.64, 0.91, 1), (0, 0, 1, 1, 0, 0)),
    ((0, 0.11, 0.34, 0.65, 1), (0.5, 1, 1, 0, 0)),
)
"""Matplotlib's colours "jet": where red, green and blue bend, and their values there."""


def _unit(x: np.ndarray) -> np.ndarray:
    """From 0, the least, to 1, the most; 0 everywhere where all are equal."""
    x = x.astype(np.float32)
    x = x - x.min()
    most = x.max()
    return x / most if most > 0 else x


def _smooth(x: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian blur with mirrored borders; the kernel ends after four deviations."""
    reach = int(4 * deviation + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    kernel /= kernel.sum()
    for _ in range(2):
        padded = np.pad(x, ((reach, reach), (0, 0)), mode="symmetric")
        x = (np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=0) @ kernel).T
    return x


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    """The image in a square of `side`, where it is larger."""
    scale = min(1.0, side / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _spread(total: int, count: int) -> list[int]:
    count = min(count, total)
    return [(2 * n + 1) * total // (2 * count) for n in range(count)]


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _canvas(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    block = Image.new("RGB", (WIDTH - 2 * MARGIN, height), PAPER)
    return block, ImageDraw.Draw(block)


def _heading(text: str) -> Image.Image:
    block, draw = _canvas(44)
    draw.text((0, 6), text, font=_font(22), fill=INK)
    draw.line((0, 42, block.width, 42), fill=FAINT, width=1)
    return block


def _text_row(text: Mapping[str, Any], result: str, place: dict[str, int], gallery: Gallery) -> Image.Image:
    block, draw = _canvas(THUMB + 26)
    bottom = _paragraph(draw, (0, 0), text["text"], TEXT_WIDTH - GAP, _font(18), INK, lines=6)
    draw.text((0, bottom + 6), f"right image: rank {text['rank'][result]}", font=_font(15), fill=FAINT)
    for n, name in enumerate(text["best"][result]):
        left = TEXT_WIDTH + GAP + n * (THUMB + GAP)
        right = name == text["image"]
        _thumb(block, draw, (left, 0), gallery.image(place[name]), right=right)
        label = f"{n + 1}  right" if right else f"{n + 1}"
        draw.text((left, THUMB + 4), label, font=_font(16), fill=RIGHT if right else FAINT)
    return block


def _image_row(
    image: Mapping[str, Any], result: str, words: dict[str, str], shown: Image.Image
) -> Image.Image:
    step, left = 48, THUMB + 2 * GAP
    block, draw = _canvas(max(THUMB + 26, SHOWN * step))
    _thumb(block, draw, (0, 0), shown, right=False)
    draw.text((0, THUMB + 4), f"first right text: rank {image['rank'][result]}", font=_font(15), fill=FAINT)
    for n, name in enumerate(image["best"][result]):
        right, top = name in image["texts"], n * step
        draw.text(
            (left, top),
            f"{n + 1}  right" if right else f"{n + 1}",
            font=_font(17),
            fill=RIGHT if right else FAINT,
        )
        start = left + 72
        width = block.width - start
        _paragraph(draw, (start, top), words[name], width, _font(18), RIGHT if right else INK, lines=2)
    return block


def _thumb(
    block: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], image: Image.Image, *, right: bool
) -> None:
    """The whole image in a square, not cropped: what is cut off may be what the text is about."""
    left, top = at
    draw.rectangle((left, top, left + THUMB - 1, top + THUMB - 1), fill=PANEL)
    room = THUMB - (12 if right else 0)
    scale = min(room / image.width, room / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    small = image.resize(size, Image.Resampling.LANCZOS)
    block.paste(small, (left + (THUMB - size[0]) // 2, top + (THUMB - size[1]) // 2))
    if right:
        draw.rectangle((left, top, left + THUMB - 1, top + THUMB - 1), outline=RIGHT, width=5)


def _paragraph(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    width: int,
    font: Any,
    fill: str,
    *,
    lines: int,
) -> int:
    """Draw `text` wrapped to `width` pixels, cut with "..." after `lines` lines; returns where it ends."""
    rows = wrap(draw, text, width, font)
    if len(rows) > lines:
        rows = [*rows[: lines - 1], _cut(draw, rows[lines - 1], width, font)]
    step = font.size + 5
    for n, row in enumerate(rows):
        draw.text((at[0], at[1] + n * step), row, font=font, fill=fill)
    return at[1] + len(rows) * step


def wrap(draw: ImageDraw.ImageDraw, text: str, width: int, font: Any) -> list[str]:
    """Lines of at most `width` pixels, broken at blanks; a longer word is broken where it must be."""
    rows, row = [], ""
    for word in text.split():
        if draw.textlength(f"{row} {word}".strip(), font=font) <= width:
            row = f"{row} {word}".strip()
            continue
        if row:
            rows.append(row)
        row = word
        while draw.textlength(row, font=font) > width:
            fits = max(1, sum(draw.textlength(row[: n + 1], font=font) <= width for n in range(len(row))))
            rows.append(row[:fits])
            row = row[fits:]
    return [*rows, row] if row else rows


def _cut(draw: ImageDraw.ImageDraw, text: str, width: int, font: Any) -> str:
    while text and draw.textlength(f"{text}...", font=font) > width:
        text = text[:-1]
    return f"{text.rstrip()}..."
