"""Where pictures lie: the paths that annotation files were written with, moved to another place."""

import re
from collections.abc import Mapping

from vlp_data import files

AUTHORS = re.compile(r"^/data/[^/]+/data/")
"""Beginning of every path in ViCHA's released lists: the authors' disk."""


def rebase(path: str, *, prefixes: Mapping[str, str] | None = None, root: str = "") -> str:
    """A picture's path with the first prefix that fits replaced, below `root`.

    `prefixes`: {old: new}, longest old first, compared piece by piece ("/a/b" fits "/a/b/c" and not "/a/bc"). None is the rule of the
    ViCHA repository for its own lists: /data/USER/data/ is dropped; {} leaves every path alone. Source: specification 5.2.
    """
    if prefixes is None:
        return files.join(root, AUTHORS.sub("", path) if root else path)
    for old in sorted(prefixes, key=len, reverse=True):
        bare = old.rstrip("/")
        if path == bare or path.startswith(f"{bare}/"):
            rest = path[len(bare) :].lstrip("/")
            new = prefixes[old]
            return files.join(root, files.join(new, rest) if new else rest)
    return files.join(root, path)
