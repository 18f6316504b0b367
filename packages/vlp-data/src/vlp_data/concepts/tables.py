"""Columnar files of lists, vocabularies and vectors, and the JSON that the ViCHA repository keeps them in.

The suffix decides: `.json` is the reference's layout, `.parquet` a table; a folder holds the parts of a
finished job (`jobs`).

  lists         [{image, caption, kwords?, ...}]         one column per field; null: the row has no such field
  vocabularies  [concept] or {concept: count}            concept: string, count: int64?
  vectors       {key: [[D numbers]]}                     key: string, embedding: list of D float16 or float32,
                                                         problem: string?

Source: data specification 5.4 and 5.5 of ViCHA.
"""

import json
import os
import posixpath
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlp_data import files
from vlp_data.errors import DataError
from vlp_data.schema import whole
from vlp_data.sources.rows import check_row, read_entries, read_json

AS_JSON = {b"vlp": b"json"}
"""Metadata of a column whose values have several types: each value is its JSON text."""


def read_table(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or all parts of a finished job's folder. Raises FileNotFoundError, DataError."""
    from vlp_data.concepts.jobs import finished_parts

    parts = [path] if path.endswith(".parquet") else finished_parts(path)
    return pa.concat_tables([_read_parquet(part, columns) for part in parts])


def read_row_group(path: str, group: int) -> pa.Table:
    """One row group of a Parquet file. Raises OSError."""
    with _parquet(path) as file:
        return file.read_row_group(group, use_threads=not files.is_url(path))


def count_row_groups(path: str) -> int:
    """Row groups of a Parquet file. Raises OSError."""
    with _parquet(path) as file:
        return file.num_row_groups


def _read_parquet(path: str, columns: Sequence[str] | None) -> pa.Table:
    try:
        with _parquet(path) as file:
            missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
            if missing:
                raise DataError(
                    f"{path} has no column {', '.join(missing)}, only {', '.join(file.schema_arrow.names)}"
                )
            return file.read(columns=columns, use_threads=not files.is_url(path))
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is no Parquet file: {error}") from error


@contextmanager
def _parquet(path: str) -> Iterator[pq.ParquetFile]:
    if not files.is_url(path):
        try:
            source = pa.memory_map(os.fspath(files.local(path)))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} not found") from None
        with source, pq.ParquetFile(source) as file:
            yield file
        return
    with files.open_read(path) as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
        # Read without threads of Arrow's own: those that call Python can outlive the interpreter, which then
        # aborts.
        yield file


def encoded(table: pa.Table, *, row_group_size: int | None = None) -> bytes:
    """A table as the bytes of a Parquet file; the same table gives the same bytes."""
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, compression="zstd", row_group_size=row_group_size)
    return stream.getvalue().to_pybytes()


def write_bytes(path: str, data: bytes) -> None:
    """Write a file so that it is complete or absent under its name."""
    if files.is_url(path):
        import fsspec.core

        filesystem, inner = fsspec.core.url_to_fs(path)
        filesystem.makedirs(posixpath.dirname(inner), exist_ok=True)
        unfinished = posixpath.join(
            posixpath.dirname(inner), f".{posixpath.basename(inner)}.{uuid.uuid4().hex}"
        )
        filesystem.pipe_file(unfinished, data)
        filesystem.mv(unfinished, inner)
        return
    target = files.local(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def remove(path: str) -> None:
    """Delete a file, if it is there."""
    if not files.is_url(path):
        files.local(path).unlink(missing_ok=True)
        return
    import fsspec.core

    filesystem, inner = fsspec.core.url_to_fs(path)
    if filesystem.exists(inner):
        filesystem.rm_file(inner)


# ------------------------------------------------------------------------------------------------ lists


def from_rows(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """A table of JSON objects. A field whose values no single column type holds exactly becomes a column of
    JSON texts. Lone surrogates, which no column holds, are left out of texts."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays, fields = [], []
    for name in names:
        present = np.fromiter((name in row for row in rows), bool, len(rows))
        values = [_whole(row.get(name)) for row in rows]
        array = _exact(values, present)
        metadata = None
        if array is None:
            texts = [
                json.dumps(v, ensure_ascii=False) if p else None for v, p in zip(values, present, strict=True)
            ]
            array, metadata = pa.array(texts, pa.string()), AS_JSON
        arrays.append(array)
        fields.append(pa.field(name, array.type, metadata=metadata))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, list):
        return [_whole(one) for one in value]
    if isinstance(value, dict):
        return {whole(name): _whole(one) for name, one in value.items()}
    return value


def _exact(values: list[Any], present: np.ndarray) -> pa.Array | None:
    """A column that gives the values back exactly; None where there is none."""
    if any(value is None and here for value, here in zip(values, present, strict=True)):
        return None  # an explicit null would be taken for a missing field
    try:
        array = pa.array(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return None
    return array if json.dumps(array.to_pylist()) == json.dumps(values) else None


def to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The JSON objects of a table, without the fields that are null."""
    decoded = {field.name for field in table.schema if (field.metadata or {}).get(b"vlp") == b"json"}
    return [
        {k: json.loads(v) if k in decoded else v for k, v in row.items() if v is not None}
        for row in table.to_pylist()
    ]


def read_list(paths: str | Iterable[str]) -> pa.Table:
    """Rows of one or more lists, one after the other. Raises FileNotFoundError, DataError."""
    parts = []
    for path in [paths] if isinstance(paths, str) else paths:
        if _is_json(path):
            rows = read_entries(path)
            bad = next((n for n, row in enumerate(rows) if not isinstance(row, dict)), None)
            if bad is not None:
                raise DataError(f"{path}: entry {bad} must be an object, found {type(rows[bad]).__name__}")
            for number, row in enumerate(rows):
                check_row(row, f"{path}: entry {number}")
            parts.append(from_rows(rows))
        else:
            parts.append(read_table(path))
    if not any(part.num_rows for part in parts):
        raise DataError(f"no rows in {paths if isinstance(paths, str) else ', '.join(paths)}")
    if len({part.schema.to_string(show_field_metadata=True) for part in parts}) == 1:
        return pa.concat_tables(parts)
    return from_rows([row for part in parts for row in to_rows(part)])


def write_list(path: str, table: pa.Table) -> None:
    """Write rows as the suffix of `path` says. Raises DataError for another suffix."""
    if _is_json(path):
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in to_rows(table))
        write_bytes(path, f"[{rows}]\n".encode())
    elif path.endswith(".parquet"):
        write_bytes(path, encoded(table))
    else:
        raise DataError(f"{path}: a list is written as .json or .parquet")


def texts_of(table: pa.Table, name: str) -> pa.Array:
    """A column of strings. Raises DataError when it is missing, or a row has none or something else there."""
    if name not in table.column_names:
        raise DataError(f"the list has no field `{name}`, only {', '.join(table.column_names)}")
    column = table.schema.field(name)
    if (
        not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type))
        or column.metadata == AS_JSON
    ):
        raise DataError(f"`{name}` must be one string in every row of the list, found {column.type}")
    found = table[name].combine_chunks()
    if found.null_count:
        raise DataError(f"`{name}` is missing in {found.null_count} of {len(found)} rows")
    return found


def with_images(table: pa.Table, name: Callable[[str], str]) -> pa.Table:
    """A list whose images (`image`, `images`) have other paths."""
    for column in ("image", "images"):
        if column in table.column_names:
            field = table.schema.field(column)
            values = [
                value and (name(value) if isinstance(value, str) else [name(path) for path in value])
                for value in table[column].to_pylist()
            ]
            table = table.set_column(table.column_names.index(column), field, pa.array(values, field.type))
    return table


# ----------------------------------------------------------------------------------------- vocabularies


def read_vocabulary(path: str) -> dict[str, int | None]:
    """The concepts of a vocabulary, in order, with the number of their mentions where the file has it.

    The numbers of the reference's {concept: count} are one less than the mentions. Raises FileNotFoundError,
    DataError.
    """
    if _is_json(path):
        content = read_json(path, (list, dict))
        names = list(content)
        counts: list[int | None] = [None] * len(names)
        if isinstance(content, dict):
            if not all(type(number) is int for number in content.values()):
                raise DataError(f"{path}: the count of a concept must be a whole number")
            counts = [number + 1 for number in content.values()]
    else:
        table = read_table(path, ["concept", "count"])
        names, counts = (table[name].to_pylist() for name in ("concept", "count"))
    if not names or not all(isinstance(concept, str) and concept for concept in names):
        raise DataError(f"{path} must hold concepts: strings that are not empty, at least one")
    if len(set(names)) != len(names):
        raise DataError(f"{path}: a concept is listed twice")
    return dict(zip(names, counts, strict=True))


def write_vocabulary(path: str, counts: Mapping[str, int | None]) -> None:
    """Write concepts with the number of their mentions; as .json without the numbers, a list."""
    if _is_json(path):
        write_bytes(path, (json.dumps(list(counts), ensure_ascii=False) + "\n").encode())
    elif path.endswith(".parquet"):
        columns = {
            "concept": pa.array(list(counts), pa.string()),
            "count": pa.array(list(counts.values()), pa.int64()),
        }
        write_bytes(path, encoded(pa.table(columns)))
    else:
        raise DataError(f"{path}: a vocabulary is written as .json or .parquet")


# ---------------------------------------------------------------------------------------------- vectors


@dataclass(frozen=True)
class Vectors:
    """Vectors by key.

    Attributes: `keys` (N strings, each once), `values` [N, D] float16 or float32, `problems` (why an image
        has no vector, by key).
    """

    keys: pa.Array
    values: np.ndarray
    problems: dict[str, str]

    def renamed(self, name: Callable[[str], str]) -> "Vectors":
        """The same vectors under other keys."""
        keys = pa.array([name(key) for key in self.keys.to_pylist()], pa.string())
        return Vectors(keys, self.values, {name(key): problem for key, problem in self.problems.items()})


def vector_table(
    keys: Sequence[str], values: np.ndarray, problems: Sequence[str | None] | None = None
) -> pa.Table:
    """Columns key, embedding, problem. `values` [N, D]; rows with a problem hold no vector."""
    count, width = values.shape
    problems = [None] * count if problems is None else problems
    missing = pa.array([problem is not None for problem in problems])
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.table(
        {
            "key": pa.array(keys, pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, width, mask=missing),
            "problem": pa.array(problems, pa.string()),
        }
    )


def vectors_of(table: pa.Table, where: str) -> Vectors:
    """Vectors of a table. Raises DataError when the columns are not those of `vector_table` or a key occurs
    twice."""
    kind = table.schema.field("embedding").type if "embedding" in table.column_names else None
    if kind is None or not pa.types.is_fixed_size_list(kind) or "key" not in table.column_names:
        raise DataError(
            f"{where} holds no vectors: expected the columns key and embedding, found {table.column_names}"
        )
    problems: dict[str, str] = {}
    if "problem" in table.column_names and table["problem"].null_count < table.num_rows:
        bad = table.filter(table["problem"].is_valid())
        problems = dict(zip(bad["key"].to_pylist(), bad["problem"].to_pylist(), strict=True))
        table = table.filter(table["embedding"].is_valid())
    keys = table["key"].combine_chunks()
    if len(keys.unique()) != len(keys):
        raise DataError(f"{where}: a key occurs twice")
    embedding = table["embedding"].combine_chunks()
    values = embedding.flatten().to_numpy(zero_copy_only=False).reshape(-1, kind.list_size)
    return Vectors(keys, values, problems)


def read_vectors(path: str) -> Vectors:
    """Vectors of a file or a finished job. Raises FileNotFoundError, DataError."""
    return vectors_of(read_vector_table(path), path)


def read_vector_table(path: str) -> pa.Table:
    """As `read_vectors`, as a table."""
    if not _is_json(path):
        return read_table(path)
    content = read_json(path, dict)
    rows = []
    for key, value in content.items():
        row = value[0] if isinstance(value, list) and len(value) == 1 else value
        if not isinstance(row, list) or not all(type(number) in (int, float) for number in row):
            raise DataError(f"{path}: the value of {key!r} must be one vector, a list of numbers in a list")
        rows.append(row)
    if len({len(row) for row in rows}) != 1:
        raise DataError(
            f"{path}: the vectors must all have one length, found {sorted({len(row) for row in rows})}"
        )
    return vector_table(list(content), np.asarray(rows, dtype=np.float32))


def write_vectors(path: str, vectors: Vectors) -> None:
    """Write vectors as the suffix of `path` says; keys without a vector are not written to .json."""
    if _is_json(path):
        lines = (
            f"{json.dumps(key, ensure_ascii=False)}: {json.dumps([row])}"
            for key, row in zip(vectors.keys.to_pylist(), vectors.values.tolist(), strict=True)
        )
        write_bytes(path, ("{" + ",\n".join(lines) + "}\n").encode())
    elif path.endswith(".parquet"):
        table = vector_table(vectors.keys.to_pylist(), vectors.values)
        if vectors.problems:
            blank = np.zeros((len(vectors.problems), vectors.values.shape[1]), vectors.values.dtype)
            bad = vector_table(list(vectors.problems), blank, list(vectors.problems.values()))
            table = pa.concat_tables([table, bad])
        write_bytes(path, encoded(table))
    else:
        raise DataError(f"{path}: vectors are written as .json or .parquet")


def _is_json(path: str) -> bool:
    return path.endswith((".json", ".json.gz"))
