"""Errors of vlp_data. Users see `DataError`; `BadSample` marks one unusable sample and ends in the loader."""


class DataError(ValueError):
    """Data cannot be used as asked; the message names the file or field and the way out."""


class BadSample(Exception):
    """One sample cannot be used: the loader counts it by `cause` and takes another one.

    Attributes: `cause` (a few words, the same for all samples with this fault), `file` (what the user has to
    look at), `detail` (what was found).
    """

    def __init__(self, cause: str, file: str, detail: str) -> None:
        super().__init__(cause, file, detail)
        self.cause, self.file, self.detail = cause, file, detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.file}: {self.detail}"
