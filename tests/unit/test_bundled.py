"""Which of the predictors that come with the project speaks for this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvr_partition import PartitionPredictor, PartitionTable, bundled, load
from kvr_partition.bundled import matching_predictor
from kvr_partition.resources import models_folder
from tests.models import provenance
from tests.predictors import predictor


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder with one predictor for `llama`, trained under `provenance()`."""
    (tmp_path / "llama").mkdir()
    predictor().save(tmp_path / "llama" / "here.predictor.json")
    monkeypatch.setattr(bundled, "models_folder", lambda: tmp_path)
    return tmp_path


def test_it_must_fit_model_hardware_and_link_exactly(models: Path) -> None:
    found, where = matching_predictor(provenance(ranks=3))
    assert found is not None
    assert where == "here.predictor.json"
    for change, reason in (
        ({"ranks": 5}, "is for 2, 3, 8 ranks, not 5"),
        ({"device": "another processor"}, "is for device 'a processor', not 'another processor'"),
        ({"dtype": "float16"}, "is for dtype 'float32', not 'float16'"),
        ({"link": "gloo over loopback, held to 1 GB/s"}, "is for link 'gloo over loopback', not"),
    ):
        none, why = matching_predictor(provenance(**change))
        assert none is None
        assert reason in why
    # Versions may differ: what a search found on this hardware is still the best guess.
    assert matching_predictor(provenance(torch="9.9"))[0] is not None


def test_it_says_when_there_is_none(models: Path) -> None:
    (models / "llama" / "here.predictor.json").unlink()
    assert matching_predictor(provenance()) == (None, "no predictor comes with llama")
    (models / "llama" / "torn.predictor.json").write_text('{"schema": "kvr-partition/pred')
    none, why = matching_predictor(provenance())
    assert none is None
    assert "torn.predictor.json is not one of our JSON files" in why


@pytest.mark.parametrize(
    "file", sorted(models_folder().glob("*/*.json")), ids=lambda file: f"{file.parent.name}/{file.name}"
)
def test_what_comes_with_the_project_can_be_read(file: Path) -> None:
    if file.name == "config.json":
        return
    found = load(file)
    assert found.provenance is not None
    assert found.provenance.model.name == file.parent.name
    if isinstance(found, PartitionPredictor):
        for grid in found.grids:
            partition = found.predict((grid.contexts[0] + grid.contexts[-1]) // 2, ranks=grid.ranks).partition
            assert min(partition.sizes) > 0
    else:
        assert isinstance(found, PartitionTable)
        assert found.entries
