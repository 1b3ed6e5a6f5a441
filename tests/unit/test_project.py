"""The project keeps its own promises: README, constraints, wheel."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from kvr_partition import resources
from kvr_partition._version import __version__

ROOT = Path(__file__).parents[2]
PRODUCT = {
    str(path.relative_to(ROOT))
    for folder in ("kvr_partition", "profiler")
    for path in (ROOT / folder).rglob("*.py")
}


def quick_start_blocks() -> list[str]:
    section = (ROOT / "README.md").read_text().split("\n## Quick start\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)


def test_the_quick_start_has_its_two_commands() -> None:
    first, second = quick_start_blocks()
    assert first.splitlines()[-1] == ".venv/bin/kvr-partition search"
    assert second.splitlines()[-1] == ".venv/bin/python -m pytest"
    assert all("-c constraints.txt" in block for block in (first, second))


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    names = {re.split(r"[>=\[]", one)[0].lower() for one in wanted} - {"kvr-partition"}
    lines = [
        line.replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines)
    pinned = {line.split("==")[0].lower() for line in lines}
    assert names <= pinned


def test_models_are_found() -> None:
    assert (resources.models_folder() / "quickstart-llama" / "config.json").is_file()


def test_the_wheel_has_models_and_no_measurements(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "kvr_partition/models/quickstart-llama/config.json" in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"kvr_partition", "profiler"}
    assert not [name for name in names if name.startswith(("kvr_partition/data", "data"))]
    assert wheel.stat().st_size < 1_000_000


def test_the_version_is_one_that_pip_understands() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def _code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    words = ast.get_docstring(function, clean=False)
    return (function.end_lineno or 0) - function.lineno + 1 - (0 if words is None else words.count("\n") + 1)


LONGER = {
    ("kvr_partition/search/correction.py", "_with_costs"),
}
"""Functions that are longer, and why."""


@pytest.mark.parametrize("path", sorted(PRODUCT), ids=str)
def test_files_and_functions_are_short(path: str) -> None:
    text = (ROOT / path).read_text()
    assert text.count("\n") <= 450, f"{path} is more than one thing"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert _code_lines(node) <= 60, f"{path}: {node.name} has {_code_lines(node)} lines"


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_are_there(page: str) -> None:
    """By a path, or by the end of one."""
    files = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    for named in re.findall(r"`([\w/.-]+\.py)`", (ROOT / page).read_text()):
        assert any(f"/{file}".endswith(f"/{named}") for file in files), f"{page} names {named}"
    for target in re.findall(r"\]\(([\w./-]+\.md)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).is_file(), f"{page} links to {target}"


def test_the_architecture_fits_on_two_screens() -> None:
    assert (ROOT / "docs/architecture.md").read_text().count("\n") <= 100


def test_tests_share_helpers_that_are_modules_of_their_own() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        assert not re.search(r"from tests\.\w+\.test_\w+ import", path.read_text()), path
