"""Pictures of what was retrieved, for a README, a report or a look at what a model confuses."""

from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vlp_eval.gallery import Gallery
from vlp_eval.report import Scores

THUMB, GAP, MARGIN, TEXT_WIDTH = 168, 14, 24, 300
SHOWN = 5
BEST_WIDTH = SHOWN * (THUMB + GAP) - GAP
WIDTH = 2 * MARGIN + TEXT_WIDTH + GAP + BEST_WIDTH
INK, FAINT, RIGHT, PAPER, PANEL = "#1b1f24", "#6a737d", "#1a7f37", "#ffffff", "#eef1f4"


def retrieval_figure(scores: Scores, gallery: Gallery, *, queries: int = 4) -> Image.Image:
    """Texts with their five best pictures, then pictures with their five best texts, by the last stage of `scores`.

    `queries` of each kind, spread evenly over the gallery, so that they are neither the best nor the worst ones. Right answers have a green frame
    or green letters and the word "right"; where the right one is not among the five, its rank is said. `gallery` must be the one that
    `scores` is of.
    """
    stage = list(scores.stages)[-1]
    images, texts = scores.samples["images"], scores.samples["texts"]
    if [one["id"] for one in images] != list(gallery.image_ids) or [one["id"] for one in texts] != list(
        gallery.text_ids
    ):
        raise ValueError("the scores are of another gallery: ids differ")
    place = {name: i for i, name in enumerate(gallery.image_ids)}
    words = dict(zip(gallery.text_ids, gallery.texts, strict=True))
    head = f"{stage}: {len(images)} pictures, {len(texts)} texts"
    blocks = [_heading(f"Text to picture, {head}")]
    blocks += [_text_row(texts[j], stage, place, gallery) for j in _spread(len(texts), queries)]
    blocks += [_heading(f"Picture to text, {head}")]
    blocks += [_image_row(images[i], stage, words, gallery.image(i)) for i in _spread(len(images), queries)]
    height = 2 * MARGIN + sum(block.height for block in blocks) + GAP * (len(blocks) - 1)
    page = Image.new("RGB", (WIDTH, height), PAPER)
    top = MARGIN
    for block in blocks:
        page.paste(block, (MARGIN, top))
        top += block.height + GAP
    return page


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


def _text_row(text: Mapping[str, Any], stage: str, place: dict[str, int], gallery: Gallery) -> Image.Image:
    block, draw = _canvas(THUMB + 26)
    bottom = _paragraph(draw, (0, 0), text["text"], TEXT_WIDTH - GAP, _font(18), INK, lines=6)
    draw.text((0, bottom + 6), f"right picture: rank {text['rank'][stage]}", font=_font(15), fill=FAINT)
    for n, name in enumerate(text["best"][stage]):
        left = TEXT_WIDTH + GAP + n * (THUMB + GAP)
        right = name == text["image"]
        _thumb(block, draw, (left, 0), gallery.image(place[name]), right=right)
        label = f"{n + 1}  right" if right else f"{n + 1}"
        draw.text((left, THUMB + 4), label, font=_font(16), fill=RIGHT if right else FAINT)
    return block


def _image_row(
    image: Mapping[str, Any], stage: str, words: dict[str, str], picture: Image.Image
) -> Image.Image:
    step, left = 48, THUMB + 2 * GAP
    block, draw = _canvas(max(THUMB + 26, SHOWN * step))
    _thumb(block, draw, (0, 0), picture, right=False)
    draw.text((0, THUMB + 4), f"first right text: rank {image['rank'][stage]}", font=_font(15), fill=FAINT)
    for n, name in enumerate(image["best"][stage]):
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
    block: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], picture: Image.Image, *, right: bool
) -> None:
    """The whole picture in a square, not cropped: what is cut off may be what the text is about."""
    left, top = at
    draw.rectangle((left, top, left + THUMB - 1, top + THUMB - 1), fill=PANEL)
    room = THUMB - (12 if right else 0)
    scale = min(room / picture.width, room / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    small = picture.resize(size, Image.Resampling.LANCZOS)
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
