"""A contact sheet: images of a shapes folder with their captions, for a person to look at."""

import json
import os
import textwrap
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMN, MARGIN, LINE, FONT = 288, 12, 15, 12


def sheet(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    first: int = 16,
    split: str | None = None,
    boxes: bool = False,
) -> int:
    """Draw the first scenes of a folder with number and captions into one image.

    Args:
        folder: written by `shapes.write`.
        target: file to write; its suffix decides the format.
        first: scenes to show.
        split: only scenes of this split.
        boxes: draw the box of each object and list the referring expressions too.

    Returns:
        Scenes shown.

    Raises:
        ValueError: nothing to show, or no such folder.
    """
    path = Path(folder)
    try:
        with (path / "annotations.jsonl").open(encoding="ascii") as lines:
            records = list(islice((r for r in map(json.loads, lines) if split in (None, r["split"])), first))
    except FileNotFoundError:
        raise ValueError(
            f"{path / 'annotations.jsonl'} not found; `vlp-data shapes {path}` writes it"
        ) from None
    if not records:
        raise ValueError(f"{path} has no scene to show (first={first}, split={split})")

    font = ImageFont.load_default(FONT)
    cells = [_cell(path, record, font, boxes) for record in records]
    columns = min(4, len(cells))
    rows = [cells[k : k + columns] for k in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    page = Image.new(
        "RGB", (columns * (COLUMN + MARGIN) + MARGIN, sum(heights) + MARGIN * (len(rows) + 1)), "white"
    )
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for number, cell in enumerate(row):
            page.paste(cell, (MARGIN + number * (COLUMN + MARGIN), top))
        top += height + MARGIN
    page.save(target)
    return len(cells)


def _cell(
    path: Path, record: dict, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, boxes: bool
) -> Image.Image:
    texts = [
        f"{record['split']} {record['image']}",
        *(f"{k}. {text}" for k, text in enumerate(record["captions"], start=1)),
    ]
    if boxes:
        texts += [f"[{expression['object']}] {expression['text']}" for expression in record["expressions"]]
    lines = [
        line for text in texts for line in textwrap.wrap(text, COLUMN * 2 // FONT, subsequent_indent="   ")
    ]
    cell = Image.new("RGB", (COLUMN, COLUMN + LINE * len(lines) + 4), "white")
    with Image.open(path / record["image"]) as image:
        cell.paste(image.convert("RGB").resize((COLUMN, COLUMN), Image.Resampling.NEAREST), (0, 0))
    pen = ImageDraw.Draw(cell)
    if boxes:
        scale = COLUMN / record["width"]
        for number, thing in enumerate(record["objects"]):
            x, y, width, height = (value * scale for value in thing["bbox"])
            pen.rectangle((x, y, x + width - 1, y + height - 1), outline="white", width=3)
            pen.rectangle((x + 1, y + 1, x + width - 2, y + height - 2), outline="black")
            pen.text(
                (x + 3, y + 2), str(number), fill="black", font=font, stroke_width=2, stroke_fill="white"
            )
    for number, line in enumerate(lines):
        pen.text((0, COLUMN + 4 + number * LINE), line, fill="black", font=font)
    return cell
