"""Source options whose relative paths start at a folder."""

from dataclasses import fields, replace
from typing import Any, TypeVar

from vlp_data.files import join

_Options = TypeVar("_Options")
PATH_FIELDS = (
    "files",
    "annotations",
    "captions",
    "image_data",
    "index",
    "refs",
    "instances",
    "detections",
)
"""Fields of source options that name files; an empty one stays empty."""
FOLDER_FIELDS = ("root", "images", "dataset_roots")
"""Fields that name folders; an empty one is the root itself."""


def rooted(options: _Options, root: str) -> _Options:
    """The same source options with relative paths below `root` (a folder or fsspec URL)."""
    present = {field.name for field in fields(options)}  # type: ignore[arg-type]

    def below(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: join(root, item) if item else root for key, item in value.items()}
        if isinstance(
            value, tuple
        ):  # an item may be several paths joined by commas (see `vlp_data.files.expand`)
            return tuple(join(root, part.strip()) for item in value for part in item.split(","))
        return join(root, value)

    changed = {
        name: below(value) for name in PATH_FIELDS if name in present and (value := getattr(options, name))
    }
    changed |= {
        name: below(value) if value or isinstance(value, dict) else root
        for name in FOLDER_FIELDS
        if name in present
        for value in (getattr(options, name),)
    }
    return replace(options, **changed)  # type: ignore[type-var]
