"""JSON Schemas of the files that other programs read; ``docs/schema/`` has them as files.

``python -m kvr_partition.schemas FOLDER`` writes them anew.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import msgspec

from kvr_partition import export, predictor, table
from kvr_partition.jsonfile import encode


def schemas() -> dict[str, dict[str, Any]]:
    """By the name of what they describe."""
    kinds = {
        "table": (table.TableFile, table.SCHEMA),
        "predictor": (predictor.PredictorFile, predictor.SCHEMA),
        "router": (export.RouterTable, export.ROUTER_SCHEMA),
    }
    found = {}
    for name, (kind, schema) in kinds.items():
        # As a reader of the file has it: lists for tuples, and descriptions indented alike under every Python.
        document = _plain(msgspec.to_builtins(msgspec.json.schema(kind)))
        title = document["$ref"].rpartition("/")[2]
        document["$defs"][title]["properties"]["schema"] = {"const": schema}
        found[name] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return inspect.cleandoc(value) if isinstance(value, str) else value


def main() -> None:
    """Write them."""
    folder = Path(sys.argv[1])
    for name, document in schemas().items():
        (folder / f"{name}.schema.json").write_bytes(encode(document))


if __name__ == "__main__":
    main()
