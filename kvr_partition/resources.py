"""The models that come with the project, from a checkout and from an installed wheel alike."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def models_folder() -> Path:
    """The folder with one sub-folder per LLM."""
    # The wheel keeps them inside the package; a checkout has them beside it, at its top.
    package = Path(str(files("kvr_partition")))
    inside = package / "models"
    return inside if inside.is_dir() else package.parent / "models"
