"""The k concepts nearest to each image, chosen once per image, and lists of which every row carries them.

Source: ViCHA specification 5.5. The reference computes in float16, here it is float32: the choice differs
only where scores are nearly equal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn import functional as F

from vlp_data import files
from vlp_data.concepts.embed import ImageFiles, encode_images
from vlp_data.concepts.encoders import Clip
from vlp_data.concepts.tables import read_vectors, texts_of, vectors_of
from vlp_data.errors import DataError

# Scores of a block lie in this many bytes: they are read twice after they were written, so they should stay
# in a cache.
BLOCK_BYTES = 1 << 25


class Nearest(NamedTuple):
    """ids [N, k] int64 and cosines [N, k] float32, best first."""

    ids: torch.Tensor
    scores: torch.Tensor


def nearest(
    image_embeds: torch.Tensor, concept_embeds: torch.Tensor, *, k: int, device: str | torch.device = "cpu"
) -> Nearest:
    """The k concepts of highest cosine for each image.

    image_embeds [N, D], concept_embeds [C, D], of any float type, not normalised. Exact: columns are put into
    groups, and the k groups with the highest maxima hold the k best columns, so only these groups are ranked.
    A maximum costs far less than ranking all columns. Raises ValueError when k is not in 1..C.
    """
    count = len(concept_embeds)
    if not 1 <= k <= count:
        raise ValueError(f"k={k} must lie in 1..{count}, the number of concepts")
    # Reading C / G group maxima and k * G candidates is least for G = sqrt(C / k).
    group = max(1, round((count / k) ** 0.5))
    groups = -(-count // group)
    concepts_DC = F.normalize(concept_embeds.to(device, torch.float32), dim=-1).T.contiguous()
    block = max(1, BLOCK_BYTES // (4 * groups * group))
    scores = torch.full((min(block, len(image_embeds)), groups * group), -torch.inf, device=device)
    # Column c is in group c modulo `groups`, so that a maximum runs over whole rows of memory.
    members = torch.arange(group, device=device) * groups
    ids = torch.empty(len(image_embeds), k, dtype=torch.long)
    best = torch.empty(len(image_embeds), k)
    for start in range(0, len(image_embeds), block):
        rows = F.normalize(image_embeds[start : start + block].to(device, torch.float32), dim=-1)
        found = scores[: len(rows)]
        torch.mm(rows, concepts_DC, out=found[:, :count])
        if group == 1:
            top, columns = found.topk(k)
        else:
            chosen = found.view(len(rows), group, groups).amax(1).topk(k, sorted=False).indices
            candidates = (chosen[:, :, None] + members).flatten(1)
            top, places = found.gather(1, candidates).topk(k)
            columns = candidates.gather(1, places)
        ids[start : start + block], best[start : start + block] = columns.cpu(), top.cpu()
    return Nearest(ids, best)


class Vocabulary(NamedTuple):
    """Concepts and their vectors [C, D]."""

    names: pa.Array
    embeds: torch.Tensor


def read_concepts(path: str) -> Vocabulary:
    """Vectors of concepts. Raises FileNotFoundError, DataError."""
    vectors = read_vectors(path)
    return Vocabulary(vectors.keys, torch.from_numpy(np.array(vectors.values)))


def choose(
    keys: pa.Array,
    embeds: np.ndarray,
    concepts: Vocabulary,
    *,
    k: int,
    device: str,
    problems: dict[str, str] | None = None,
) -> pa.Table:
    """Columns image, concepts (k names, best first), scores (their cosines), problem (then the image has no
    concepts)."""
    if embeds.shape[1] != concepts.embeds.shape[1]:
        raise DataError(
            f"the images have vectors of {embeds.shape[1]} numbers, "
            f"the concepts of {concepts.embeds.shape[1]}; "
            "embed both with the same model"
        )
    problems = problems or {}
    found = nearest(torch.from_numpy(np.array(embeds)), concepts.embeds, k=k, device=device)
    ends = pa.array(np.arange(0, len(keys) * k + 1, k, dtype=np.int32))
    names = concepts.names.take(pa.array(found.ids.flatten().numpy()))
    columns = {
        "image": pa.array(keys, pa.string()),
        "concepts": pa.ListArray.from_arrays(ends, names),
        "scores": pa.ListArray.from_arrays(ends, pa.array(found.scores.flatten().numpy())),
        "problem": pa.nulls(len(keys), pa.string()),
    }
    table = pa.table(columns)
    bad = {"image": list(problems), "problem": list(problems.values())}
    bad |= {name: [None] * len(problems) for name in ("concepts", "scores")}
    return pa.concat_tables([table, pa.Table.from_pydict(bad, schema=table.schema)])


@dataclass(frozen=True, kw_only=True)
class ChooseSaved:
    """Work of a job: vectors of images to their concepts."""

    concepts: str
    """Vectors of the concepts."""
    k: int = 15
    device: str = "auto"

    def identity(self) -> dict[str, Any]:
        return {"work": "choose", "k": self.k, "concepts": [self.concepts, _content(self.concepts)]}

    def start(self) -> Callable[[pa.Table], pa.Table]:
        concepts, device = read_concepts(self.concepts), _device(self.device)

        def compute(items: pa.Table) -> pa.Table:
            vectors = vectors_of(items, "a part of the images")
            return choose(
                vectors.keys, vectors.values, concepts, k=self.k, device=device, problems=vectors.problems
            )

        return compute


@dataclass(frozen=True, kw_only=True)
class ChooseInOnePass:
    """Work of a job: images (column `key`) to their concepts, without keeping the vectors."""

    concepts: str
    clip: Clip
    images: ImageFiles
    k: int = 15

    def identity(self) -> dict[str, Any]:
        return {
            "work": "choose in one pass",
            "k": self.k,
            "concepts": [self.concepts, _content(self.concepts)],
            **self.images.identity(),
            **self.clip.identity(),
        }

    def start(self) -> Callable[[pa.Table], pa.Table]:
        concepts, encoder, device = read_concepts(self.concepts), self.clip.load(), _device(self.clip.device)

        def compute(items: pa.Table) -> pa.Table:
            keys = items["key"].to_pylist()
            values, problems = encode_images(encoder, keys, self.images)
            good = np.array([problem is None for problem in problems])
            bad = {key: problem for key, problem in zip(keys, problems, strict=True) if problem is not None}
            return choose(
                items["key"].combine_chunks().filter(pa.array(good)),
                values[good],
                concepts,
                k=self.k,
                device=device,
                problems=bad,
            )

        return compute


def _content(path: str) -> list[Any]:
    """A text that changes when the vectors at `path` change."""
    from vlp_data.concepts.jobs import finished_parts

    parts = [path] if path.endswith((".json", ".json.gz", ".parquet")) else finished_parts(path)
    return [list(files.stamp(part)) for part in parts]


def _device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


# ------------------------------------------------------------------------------------------------ lists


Missing: TypeAlias = Literal["error", "drop", "keep"]


class Assigned(NamedTuple):
    """A list with concepts, and the images of it that have none."""

    rows: pa.Table
    without: list[str]


def images_of(rows: pa.Table) -> list[pa.Array]:
    """Names of the images of every row: one array, or two for a list of pairs (NLVR2). Raises DataError."""
    if "images" not in rows.column_names:
        return [texts_of(rows, "image")]
    images = rows["images"].combine_chunks()
    kind = images.type
    if (
        not pa.types.is_list(kind)
        or images.null_count
        or pc.unique(pc.list_value_length(images)).to_pylist() != [2]
    ):
        raise DataError("`images` must be a list of two paths in every row of the list")
    return [pc.list_element(images, number).cast(pa.string()) for number in (0, 1)]


def distinct_images(rows: pa.Table) -> pa.Array:
    """Every image of a list once, in the order of first mention; of pairs the first image of a row comes
    first."""
    names = images_of(rows)
    if len(names) == 1:
        return names[0].unique()
    flat = [name for pair in zip(*(array.to_pylist() for array in names), strict=True) for name in pair]
    return pa.array(flat, pa.string()).unique()


def places(names: pa.Array, keys: pa.Array, root: str = "") -> pa.Array:
    """Where each image stands in `keys`, null where it does not; the names are taken below `root`."""
    if root:
        names = pa.array([files.join(root, name) for name in names.to_pylist()], pa.string())
    return pc.index_in(names, value_set=keys)


def assign(rows: pa.Table, choices: pa.Table, *, root: str = "", missing: Missing = "error") -> Assigned:
    """A list with the concepts of its images: field `kwords`, or `kwords1` and `kwords2` for a list of pairs.

    choices: columns image and concepts. `root` is put before the images of the list to find them there.
    Fields of the same names are replaced. `missing`: rows of images without concepts are an error
    (DataError), left out ("drop"), or stay without the fields ("keep", what the reference does to pairs).
    """
    names = images_of(rows)
    usable = choices.filter(choices["concepts"].is_valid())
    keys = usable["image"].combine_chunks()
    found = [places(each, keys, root) for each in names]
    lacking = pc.unique(
        pa.chunked_array([each.filter(place.is_null()) for each, place in zip(names, found, strict=True)])
    ).to_pylist()
    if lacking and missing == "error":
        known = dict(zip(choices["image"].to_pylist(), choices["problem"].to_pylist(), strict=True))
        first = lacking[0]
        why = known.get(files.join(root, first)) or "it is not among the images that concepts were chosen for"
        raise DataError(
            f"{len(lacking)} images of the list have no concepts, the first is {first}: {why}; "
            "missing=drop leaves their rows out"
        )
    complete = found[0].is_valid()
    for place in found[1:]:
        complete = pc.and_(complete, place.is_valid())
    if missing == "drop":
        rows, found = rows.filter(complete), [place.filter(complete) for place in found]
    else:
        found = [pc.if_else(complete, place, None) for place in found]
    fields = ["kwords"] if len(names) == 1 else ["kwords1", "kwords2"]
    rows = rows.drop_columns([name for name in fields if name in rows.column_names])
    concepts = usable["concepts"].combine_chunks()
    for name, place in zip(fields, found, strict=True):
        rows = rows.append_column(name, concepts.take(place))
    return Assigned(rows, lacking)
