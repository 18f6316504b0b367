"""Errors of vlp_data, and how a message shows what a file holds. Users see `DataError`; `BadSample` marks one
unusable sample and ends in the loader.

Messages come from data that anybody may have written and go to terminals, logs and run folders: characters
that steer a terminal are escaped, and keys inside of URLs are masked (`shown`).
"""

import re
from typing import NamedTuple

_USER = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(
    r"([?&][^=&\s]*(?:sig|token|key|secret|password|passwd|credential|auth)[^=&\s]*=)[^&\s#'\"]+",
    re.IGNORECASE,
)


def shown(text: object) -> str:
    """`text` as a message may show it: on one line, control characters and halves of characters (lone
    surrogates) escaped, user and key of URLs (`s3://KEY:SECRET@bucket`, `?token=...`) replaced by `***`."""
    words = str(text)
    if "://" in words:
        words = _QUERY.sub(r"\1***", _USER.sub("***@", words))
    if words.isprintable():
        return words
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode() for one in words
    )


class DataError(ValueError):
    """Data cannot be used as asked; the message names the file or field and the way out."""

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message))


class WorkerLost(DataError):
    """Worker processes of a loader died again and again (mostly for want of memory). The loader stands where
    it stood: what was trained can be saved, and a later run goes on from there."""


class BadSample(Exception):
    """One sample cannot be used: the loader counts it by `cause` and takes another one.

    Attributes: `cause` (a few words, the same for all samples with this fault), `file` (what the user has to
    look at), `detail` (what was found); all as `shown` in messages.
    """

    def __init__(self, cause: str, file: str, detail: str) -> None:
        file, detail = shown(file), shown(detail)
        super().__init__(cause, file, detail)
        self.cause, self.file, self.detail = cause, file, detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.file}: {self.detail}"


class Skipped(NamedTuple):
    """What cannot be used, of a sample or the whole of it: counted by `cause`, logged once per cause with
    `file`."""

    cause: str
    file: str
    detail: str
