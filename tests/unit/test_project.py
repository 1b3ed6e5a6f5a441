"""The project keeps its own promises: README, constraints, wheel."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from kvr_partition import resources
from kvr_partition._version import __version__

ROOT = Path(__file__).parents[2]


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


def test_models_and_data_are_found() -> None:
    assert (resources.models_folder() / "quickstart-llama" / "config.json").is_file()
    assert (resources.data_folder() / "README.md").is_file()


def test_the_version_is_one_that_pip_understands() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
