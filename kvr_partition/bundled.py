"""The tables and predictors that come with the project, and which of them fit a machine exactly."""

from __future__ import annotations

from pathlib import Path

from kvr_partition.errors import KVRError
from kvr_partition.loading import load
from kvr_partition.predictor import PartitionPredictor
from kvr_partition.provenance import Provenance
from kvr_partition.resources import models_folder

MATCHED = ("dtype", "backend", "topology", "depth", "layers", "batch", "device", "threads_per_rank", "link")
"""Conditions, besides the model's configuration, under which a predictor trained elsewhere says something here."""


def bundled_predictors(model: str) -> list[Path]:
    """Files of the predictors that come with a model of ``models/``, by its folder's name."""
    return sorted((models_folder() / model).glob("*.predictor.json"))


def matching_predictor(here: Provenance) -> tuple[PartitionPredictor | None, str]:
    """The bundled predictor for this very model on this very hardware and link.

    Returns:
        It and where it is from; or None and, in a line, why none of them fits.
    """
    model = here.model.name
    files = bundled_predictors(model)
    if not files:
        return None, f"no predictor comes with {model}"
    reasons = []
    for file in files:
        try:
            found = load(file)
        except KVRError as error:
            reasons.append(str(error))
            continue
        if not isinstance(found, PartitionPredictor) or found.provenance is None:
            reasons.append(f"{file.name} does not say what it is for")
            continue
        wrong = _difference(found, here)
        if wrong is None:
            return found, file.name
        reasons.append(f"{file.name} is for {wrong}")
    return None, "; ".join(reasons)


def _difference(predictor: PartitionPredictor, here: Provenance) -> str | None:
    origin = predictor.provenance
    assert origin is not None
    if origin.model.config_digest != here.model.config_digest:
        return "another configuration of the model"
    if here.ranks not in predictor.ranks:
        return f"{', '.join(map(str, predictor.ranks))} ranks, not {here.ranks}"
    for name in MATCHED:
        theirs, ours = getattr(origin, name), getattr(here, name)
        if theirs != ours:
            return f"{name} {theirs!r}, not {ours!r}"
    return None
