"""Image paths of annotation files, changed to where the images are on this machine."""

import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vlp_data import files
from vlp_data.errors import BadSample, DataError

if TYPE_CHECKING:
    from vlp_data.schema import Identifier, Image

AUTHORS_DISK = re.compile(r"^/data/[^/]+/data/")
"""Beginning of every path in ViCHA's released lists, a folder on the machine of the authors."""


def rebase(path: str, *, prefixes: Mapping[str, str], root: str) -> str:
    """An image's path with the first prefix that fits replaced, below `root`.

    `prefixes`: {old: new}, longest old first, compared piece by piece ("/a/b" fits "/a/b/c" and not "/a/bc").
    Where none fits and there is a root, the rule of the ViCHA repository for its own lists applies:
    /data/USER/data/ is dropped. Source: ViCHA specification 5.2.
    """
    for old in sorted(prefixes, key=len, reverse=True):
        bare = old.rstrip("/")
        if path == bare or path.startswith(f"{bare}/"):
            return files.join(root, files.join(prefixes[old], path[len(bare) :].lstrip("/")))
    return files.join(root, AUTHORS_DISK.sub("", path) if root else path)


def image_at(
    path: str,
    *,
    root: str = "",
    prefixes: Mapping[str, str] | None = None,
    schemes: Sequence[str] = (),
    id: "Identifier | None" = None,
    size: tuple[int, int] | None = None,
) -> "Image":
    """The image that a data file names by `path`, below `root`. `prefixes`: as in `rebase`; without them
    nothing but `root` is put before the path.

    Of URLs those are opened whose scheme is one of `schemes`, that of `root` or of a new beginning in
    `prefixes`, or reads this machine (`files.OWN_SCHEMES`). Raises BadSample ("path cannot be used") for any
    other URL, a chain of URLs, and what can be no path.
    """
    from vlp_data.schema import Image

    roots = (root, *(prefixes or {}).values())
    allowed = (*schemes, *(files.scheme(folder) for folder in roots if files.is_url(folder)))
    full = files.join(root, path) if prefixes is None else rebase(path, prefixes=prefixes, root=root)
    try:
        files.require_permitted(full, allowed)
    except DataError as error:
        raise BadSample("path cannot be used", path, str(error)) from error
    return Image(path=full, size=size, id=id, schemes=allowed)


def stem(path: str) -> str:
    """Name of a file without folder and extension: what images without an id are called."""
    return posixpath.splitext(posixpath.basename(path))[0]
