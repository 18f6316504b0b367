"""Keeping the captions that a CLIP finds nearest to their images.

Source: ViCHA specification 5.6.
"""

import numpy as np
import pyarrow as pa

from vlp_data.concepts.select import places
from vlp_data.concepts.tables import Vectors, texts_of
from vlp_data.errors import DataError


def score(
    rows: pa.Table, images: Vectors, captions: Vectors, *, root: str = "", block: int = 65536
) -> pa.Table:
    """A list with the field `sim`: cosine of image and caption (float32). Raises DataError for a row without
    a vector."""
    if images.values.shape[1] != captions.values.shape[1]:
        raise DataError(
            f"the images have vectors of {images.values.shape[1]} numbers, "
            f"the captions of {captions.values.shape[1]}; "
            "embed both with the same model"
        )
    pairs = []
    for name, vectors, base in (("image", images, root), ("caption", captions, "")):
        texts = texts_of(rows, name)
        found = places(texts, vectors.keys, base)
        if found.null_count:
            first = texts.filter(found.is_null())[0].as_py()
            why = vectors.problems.get(first, "nothing was embedded under this name")
            raise DataError(
                f"the {name} of {found.null_count} rows has no vector, the first is {first!r}: {why}"
            )
        pairs.append((vectors.values, found.to_numpy()))
    sims = np.empty(rows.num_rows, dtype=np.float32)
    for start in range(0, rows.num_rows, block):
        a, b = (_unit(values[place[start : start + block]]) for values, place in pairs)
        sims[start : start + block] = (a * b).sum(-1)
    rest = rows.drop_columns(["sim"]) if "sim" in rows.column_names else rows
    return rest.append_column("sim", pa.array(sims))


def _unit(values: np.ndarray) -> np.ndarray:
    wide = values.astype(np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)


def _sims(rows: pa.Table) -> np.ndarray:
    if "sim" not in rows.column_names:
        raise DataError("the list has no field `sim`; score it with the vectors of its images and captions")
    found = rows["sim"].combine_chunks()
    if found.null_count or not pa.types.is_floating(found.type):
        raise DataError(f"`sim` must be a number in every row of the list, found {found.type}")
    return found.to_numpy()


def _check(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must lie above 0 and not above 1")


def best(rows: pa.Table, fraction: float) -> pa.Table:
    """The int(fraction * n) rows of highest `sim`, best first; rows of equal `sim` keep their order."""
    _check(fraction)
    order = np.argsort(-_sims(rows), kind="stable")
    return rows.take(pa.array(order[: int(fraction * rows.num_rows)]))


def best_per_image(rows: pa.Table, fraction: float, *, keep_one: bool = True) -> pa.Table:
    """Of the n rows of each image the int(fraction * n) of highest `sim`, best first; images in the order of
    first mention.

    `keep_one` keeps the best row of an image where that number is 0. The reference loses such an image,
    contrary to its readme.
    """
    _check(fraction)
    group = texts_of(rows, "image").dictionary_encode().indices.to_numpy()
    order = np.lexsort((-_sims(rows), group))
    sizes = np.bincount(group)
    first = np.cumsum(sizes) - sizes
    kept = np.array([max(int(fraction * int(size)), int(keep_one)) for size in sizes])
    ranked = group[order]
    rank = np.arange(len(order)) - first[ranked]
    return rows.take(pa.array(order[rank < kept[ranked]]))
