"""Image paths of annotation files, changed to where the images are on this machine."""

import re
from collections.abc import Mapping

from vlp_data import files

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
