"""load(): a table or a predictor from a file, by the schema it names."""

from __future__ import annotations

import os

from kvr_partition import jsonfile, predictor, table
from kvr_partition.errors import FileFormatError


def load(path: str | os.PathLike[str]) -> table.PartitionTable | predictor.PartitionPredictor:
    """Read a file of ours by the schema it names.

    Raises:
        FileFormatError: missing, torn, of an unknown schema, or with values that cannot be.
    """
    content = jsonfile.read_bytes(path)
    schema = jsonfile.schema_of(content, path)
    kind = schema.rpartition("/")[0]
    if kind == table.SCHEMA.rpartition("/")[0]:
        return table.PartitionTable.from_json(content, path)
    if kind == predictor.SCHEMA.rpartition("/")[0]:
        return predictor.PartitionPredictor.from_json(content, path)
    raise FileFormatError(
        f"{os.fspath(path)} has schema {schema!r}; load() reads {table.SCHEMA!r} and {predictor.SCHEMA!r}"
    )


def load_table(path: str | os.PathLike[str]) -> table.PartitionTable:
    """Read a table.

    Raises:
        FileFormatError: anything else.
    """
    found = load(path)
    if isinstance(found, table.PartitionTable):
        return found
    raise FileFormatError(f"{os.fspath(path)} is a predictor; name a table.json that search wrote")


def load_predictor(path: str | os.PathLike[str]) -> predictor.PartitionPredictor:
    """Read a predictor.

    Raises:
        FileFormatError: anything else.
    """
    found = load(path)
    if isinstance(found, predictor.PartitionPredictor):
        return found
    raise FileFormatError(f"{os.fspath(path)} is a table; name a predictor that train wrote")
