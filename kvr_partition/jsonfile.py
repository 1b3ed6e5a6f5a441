"""Strict, versioned JSON files: typed when read, whole or absent when written."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from kvr_partition.errors import FileFormatError, StorageError

if TYPE_CHECKING:
    from pathlib import Path

# What only reads is what serving code pays for: pathlib and tempfile are imported where something is written.

T = TypeVar("T", bound=msgspec.Struct)

MAX_FILE_BYTES = 64 * 1024 * 1024
"""Files we write are far smaller; anything larger is refused before it is read into memory."""


class _Head(msgspec.Struct):
    schema: str


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file of ours.

    Raises:
        FileFormatError: missing, unreadable, not a regular file or larger than `MAX_FILE_BYTES`.
    """
    file = os.fspath(path)
    try:
        found = os.stat(file)  # noqa: PTH116
        if not stat.S_ISREG(found.st_mode):
            what = "is a folder" if stat.S_ISDIR(found.st_mode) else "is no regular file"
            raise FileFormatError(f"{file} {what}; name the JSON file itself")
        if found.st_size > MAX_FILE_BYTES:
            raise FileFormatError(f"{file} is larger than {MAX_FILE_BYTES >> 20} MiB; this is no file of ours")
        with open(file, "rb") as stream:  # noqa: PTH123
            return stream.read()
    except FileNotFoundError:
        raise FileFormatError(f"{file} does not exist; name the JSON file itself") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileFormatError(f"{file} cannot be read: {reason}") from None


def schema_of(content: bytes, path: str | os.PathLike[str]) -> str:
    """The schema a file says it has.

    Raises:
        FileFormatError: no JSON object, or one without a ``schema`` field.
    """
    try:
        return msgspec.json.decode(content, type=_Head).schema
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FileFormatError(f"{os.fspath(path)} is not one of our JSON files: {_one_line(error)}") from None


def upgraded(document: dict[str, Any], schema: str) -> dict[str, Any]:
    """A document of an older schema as the one that this version reads, as far as that is known.

    A schema's number grows when its fields do. Each step is a small change of `_STEPS`, so that a file of any age
    goes through all of them in order.
    """
    kind, _, number = str(document.get("schema")).rpartition("/")
    wanted_kind, _, wanted = schema.rpartition("/")
    if kind != wanted_kind or not number.isascii() or not number.isdigit() or len(number) > len(wanted):
        return document
    name = kind.rpartition("/")[2]
    for at in range(int(number), int(wanted)):
        if (name, at) not in _STEPS:
            return document
        document = _STEPS[name, at](document) | {"schema": f"{kind}/{at + 1}"}
    return document


def _with_layers(document: Any) -> Any:
    """Before layers could be replaced, all were the model's own: in every provenance, wherever it stands."""
    if isinstance(document, list):
        return [_with_layers(item) for item in document]
    if not isinstance(document, dict):
        return document
    changed = {name: _with_layers(value) for name, value in document.items()}
    origin = changed.get("provenance")
    if isinstance(origin, dict) and "layers" not in origin:
        changed["provenance"] = origin | {"layers": "stock"}
    return changed


def _with_searched(document: dict[str, Any]) -> dict[str, Any]:
    """Before predictors said which contexts were searched behind which past, their range was a rectangle."""

    def changed(grid: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in grid.items() if name != "trained"}
        contexts = sorted({*grid["trained"], grid["contexts"][0], grid["contexts"][-1]})
        least, most = (share / (1 - share) for share in (grid["past_shares"][0], grid["past_shares"][-1]))
        corners = {(context, math.floor(least * context)) for context in contexts}
        corners |= {(context, math.ceil(most * context)) for context in contexts}
        return kept | {"searched": sorted(corners)}

    try:
        return document | {"grids": [changed(grid) for grid in document["grids"]]}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return document  # What is wrong with it is said when it is decoded.


_STEPS: dict[tuple[str, int], Callable[[dict[str, Any]], dict[str, Any]]] = {
    ("predictor", 2): _with_searched,
} | {
    (kind, 1): _with_layers
    for kind in ("certificate", "dataset", "measurements", "predictor", "profile", "router", "table")
}
"""What turns a document of a kind and number into the next number."""


def decode(content: bytes, type_: type[T], schema: str, path: str | os.PathLike[str]) -> T:
    """Decode ``content`` strictly as ``type_``; an older schema is brought up to date first.

    Raises:
        FileFormatError: another schema, unknown or missing fields, wrong types, NaN, or a torn file.
    """
    found = schema_of(content, path)
    try:
        if found != schema:
            document = upgraded(msgspec.json.decode(content), schema)
            if document["schema"] != schema:
                raise FileFormatError(f"{os.fspath(path)} has schema {found!r}; this version reads {schema!r}")
            content = msgspec.json.encode(document)
        return msgspec.json.decode(content, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FileFormatError(f"{os.fspath(path)} is not a valid {schema} file: {_one_line(error)}") from None


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    import tempfile
    from pathlib import Path

    target = Path(path)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private to their owner; a result is meant to be shared like any other file.
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(target)
        temporary = None
        _fsync_folder(target.parent)
    except OSError as error:
        raise write_error(target, error) from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def set_torn_tail_aside(path: Path) -> bool:
    """Move a last line without its end, which a crash or a full disk leaves, to a file beside (``.torn``).

    Whatever is appended after it would be ruined as well.

    Returns:
        Whether there was one.

    Raises:
        OSError: the file cannot be read or changed.
    """
    with path.open("r+b") as stream:
        content = stream.read()
        if not content or content.endswith(b"\n"):
            return False
        whole = content.rfind(b"\n") + 1
        with path.with_name(path.name + ".torn").open("ab") as beside:
            beside.write(content[whole:] + b"\n")
            beside.flush()
            os.fsync(beside.fileno())
        stream.truncate(whole)
        os.fsync(stream.fileno())
    return True


def write_error(path: Path, error: OSError) -> StorageError:
    """The one-line error for a write that failed, with what to do about it."""
    return StorageError(
        f"{path} cannot be written: {error.strerror or error}; make room or name another folder and run the "
        "same command again, everything finished so far is kept"
    )


def encode(value: Any) -> bytes:
    """JSON for people and programs: two-space indent, newline at the end."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
