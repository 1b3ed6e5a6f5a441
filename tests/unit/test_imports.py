"""Serving code pays for nothing that it does not use."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.interpreter import HEAVY, loaded_after, modules_after


def test_importing_the_package_loads_nothing_but_itself() -> None:
    assert loaded_after("import kvr_partition") <= {"kvr_partition", *sys.stdlib_module_names}


def test_the_serving_names_need_no_more_than_msgspec() -> None:
    loaded = loaded_after(
        "from kvr_partition import KVRError, Lookup, OutOfRangeError, Partition, PartitionTable, load"
    )
    assert "msgspec" in loaded
    assert not loaded & set(HEAVY)


def test_every_public_name_is_there() -> None:
    import kvr_partition

    for name in kvr_partition.__all__:
        assert getattr(kvr_partition, name) is not None
        assert name in dir(kvr_partition)


FOLDERS = ("kvr_partition", "profiler")

MAY_IMPORT = {
    "machine": set[str](),
    "search": {"machine"},
    "training": {"machine", "search"},
    "runtime": set[str](),
    "profiler": {"machine", "runtime"},
    "session": {"machine", "runtime", "search", "training", "profiler"},
    "cli": {"machine", "search", "training", "runtime", "profiler", "session"},
}
"""What else each part may import, in functions as well; all may import what is beside them in the package."""

BESIDE = {
    "kvr_partition.__main__": {"cli"},
    # Its answers are splits that a cost balances.
    "kvr_partition.predictor": {"machine"},
    # Public names that lead to a part without loading it before it is used.
    "kvr_partition.bundled": {"search"},
    "profiler": {"session"},
}
"""What some modules import besides."""


def part_of(module: str) -> str | None:
    """The part that a module belongs to; None of those that all may import."""
    if module in ("profiler.session", "profiler.covering"):  # the main job, of contexts and of a range of them
        return "session"
    names = module.split(".")
    if names[0] == "profiler":
        return "profiler"
    return names[1] if len(names) > 1 and names[0] == "kvr_partition" and names[1] in MAY_IMPORT else None


def imported_by(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere in it, but for types alone."""
    tree = ast.parse(path.read_text())
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in types_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] in FOLDERS}


def files() -> dict[str, Path]:
    """Every module of the packages and where it stands."""
    root = Path(__file__).parents[2]
    found = {}
    for folder in FOLDERS:
        for path in (root / folder).rglob("*.py"):
            names = path.relative_to(root).with_suffix("").parts
            found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


@pytest.mark.parametrize(("module", "path"), files().items(), ids=files())
def test_arrows_go_one_way(module: str, path: Path) -> None:
    own = part_of(module)
    allowed = {own, None} | (MAY_IMPORT[own] if own is not None else set()) | BESIDE.get(module, set())
    strange = sorted(name for name in imported_by(path) if part_of(name) not in allowed)
    assert not strange, f"{module} must not import {', '.join(strange)}"


def test_ranks_load_nothing_that_searches() -> None:
    profiler = modules_after("import profiler.ranks, profiler.process, profiler.calibrate, profiler.worker")
    assert not {name for name in profiler if name.startswith(("kvr_partition.search", "kvr_partition.cli"))}
