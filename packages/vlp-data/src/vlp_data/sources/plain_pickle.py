"""Pickles of plain values, read so that nothing in them can run.

The unpickler builds plain Python values only (lists, tuples, dicts, sets, strings, bytes, numbers, booleans,
None); a pickle that names any class or function is refused.
"""

import io
import pickle
from typing import Any

from vlp_data import files
from vlp_data.errors import DataError


class _PlainUnpickler(pickle.Unpickler):
    """Builds no objects but Python's own plain values."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def read_plain_pickle(path: str) -> Any:
    """The value in a pickle of plain values, of any protocol, those of Python 2 included. Raises
    FileNotFoundError; DataError for a pickle that holds anything else (nothing of it is executed) or that is
    damaged."""
    try:
        data = files.read(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found") from None
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is no pickle of plain lists, dicts, strings and numbers: {error}; "
            "nothing of it was executed"
        ) from error
    except Exception as error:  # damaged pickles raise nearly anything
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}"[:300]) from error
