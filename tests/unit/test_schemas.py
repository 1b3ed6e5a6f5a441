"""Files of an older schema are read as what they said; newer and unknown ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvr_partition import Partition, PartitionPredictor, PartitionTable, jsonfile, load
from kvr_partition.certificate import SCHEMA as CERTIFICATE
from kvr_partition.certificate import Certificate
from kvr_partition.errors import FileFormatError, OutOfRangeError
from kvr_partition.jsonfile import decode, read_bytes
from kvr_partition.machine.profile import load_profile
from kvr_partition.provenance import Provenance
from kvr_partition.training.dataset import load_dataset
from profiler.store import MeasurementLog
from tests.models import provenance

OLD = Path(__file__).parent.parent / "fixtures" / "schema-1"
READERS: dict[str, Callable[[Path], Any]] = {
    "table.json": lambda path: load(path).provenance,
    "predictor.json": lambda path: load(path).provenance,
    "profile.json": lambda path: load_profile(path).provenance,
    "dataset.json": lambda path: load_dataset(path).rows[0].provenance,
    "certificate.json": lambda path: decode(read_bytes(path), Certificate, CERTIFICATE, path).provenance,
}


NEWEST = {"predictor.json": 3}
"""Of those that have a newer schema than 2."""


def old_origin(name: str) -> dict[str, Any]:
    document = json.loads((OLD / name).read_text())
    found: dict[str, Any] = document["rows"][0]["provenance"] if "rows" in document else document["provenance"]
    return found


@pytest.mark.parametrize("name", READERS)
def test_an_old_file_is_read_and_ran_the_models_own_layers(name: str) -> None:
    origin = READERS[name](OLD / name)
    assert isinstance(origin, Provenance)
    assert "layers" not in old_origin(name)
    assert msgspec.to_builtins(origin) == {**old_origin(name), "layers": "stock"}


def test_what_old_files_say_is_kept() -> None:
    table, predictor = load(OLD / "table.json"), load(OLD / "predictor.json")
    assert isinstance(table, PartitionTable)
    assert isinstance(predictor, PartitionPredictor)
    entries = json.loads((OLD / "table.json").read_text())["entries"]
    assert [(one.context, one.partition.sizes) for one in table.entries] == [
        (one["context"], tuple(one["sizes"])) for one in entries
    ]
    assert predictor.predict(224, ranks=2).partition.context == 224
    assert len(load_dataset(OLD / "dataset.json").rows) == 3


def test_an_old_log_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    shutil.copyfile(OLD / "run" / "measurements.jsonl", path)
    with MeasurementLog(path) as log:
        before = len(list(log.measurements()))
        assert before > 0
        (origin,) = {one.layers for one in log.provenance.values()}
        assert origin == "stock"
    content = path.read_bytes()
    with MeasurementLog(path) as log:
        assert len(list(log.measurements())) == before
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["table.json", "predictor.json", "profile.json", "dataset.json"])
def test_what_is_read_is_written_as_the_new_schema(name: str, tmp_path: Path) -> None:
    out = tmp_path / name
    match name:
        case "profile.json":
            load_profile(OLD / name).save(out)
        case "dataset.json":
            load_dataset(OLD / name).save(out)
        case _:
            load(OLD / name).save(out)
    document = json.loads(out.read_text())
    assert document["schema"] == f"kvr-partition/{name.removesuffix('.json')}/{NEWEST.get(name, 2)}"
    assert msgspec.to_builtins(READERS[name](out)) == {**old_origin(name), "layers": "stock"}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "schema",
    [
        "kvr-partition/{kind}/4",
        "kvr-partition/{kind}/" + "9" * 5000,
        "kvr-partition/{kind}/0",
        "kvr-partition/{kind}/x",
        "1",
    ],
)
def test_another_schema_is_refused_by_name(name: str, schema: str, tmp_path: Path) -> None:
    schema = schema.format(kind=name.removesuffix(".json"))
    document = json.loads((OLD / name).read_text()) | {"schema": schema}
    path = tmp_path / name
    path.write_text(json.dumps(document))
    with pytest.raises(FileFormatError) as error:
        READERS[name](path)
    assert str(path) in str(error.value)
    assert repr(schema) in str(error.value)


def test_an_old_predictor_answers_what_it_answered() -> None:
    path = OLD.parent / "schema-2" / "predictor.json"
    document = json.loads(path.read_text())
    assert document["schema"] == "kvr-partition/predictor/2"
    one = load(path)
    assert isinstance(one, PartitionPredictor)
    for grid, before in zip(one.grids, document["grids"], strict=True):
        assert {context for context, _ in grid.searched} == set(before["trained"])
        assert grid.speeds == ()
        low, high = before["contexts"][0], before["contexts"][-1]
        for context, cuts in zip(before["contexts"], before["boundaries"][0], strict=True):
            split = one.predict(context, grid.ranks).partition
            wanted = Partition.from_cuts(cuts, context, grid.quantum)
            assert split == wanted or grid.whole
        for context in (low - 1, high + 1):
            with pytest.raises(OutOfRangeError):
                one.predict(context, grid.ranks)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trained", 5),
        ("trained", ["many"]),
        ("contexts", []),
        ("contexts", "abc"),
        ("past_shares", []),
        ("past_shares", [1.0]),
        ("past_shares", [None]),
        ("past_shares", [1e308 / 1e308]),
    ],
)
def test_an_old_predictor_that_lies_is_refused_in_one_line(name: str, value: Any, tmp_path: Path) -> None:
    document = json.loads((OLD.parent / "schema-2" / "predictor.json").read_text())
    document["grids"][0][name] = value
    path = tmp_path / "one.json"
    path.write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match=r"one\.json") as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", READERS)
def test_old_files_are_read_as_strictly_as_new_ones(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    text = (OLD / name).read_text()
    for spoilt in (
        text.replace('"dtype"', '"extra": 1, "dtype"', 1),
        text.replace('"dtype"', '"dtipe"', 1),
        text.replace('"batch": 1', '"batch": "1"').replace('"batch":1', '"batch":"1"'),
        text[:-20],
    ):
        assert spoilt != text
        path.write_text(spoilt)
        with pytest.raises(FileFormatError, match=name):
            READERS[name](path)


def test_other_layers_are_another_condition() -> None:
    assert provenance().difference(provenance(layers="fused(norm)")) == "layers: stock, fused(norm)"
    assert provenance().difference(provenance()) is None


def test_a_file_of_the_present_schema_is_decoded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    load(OLD / "table.json").save(path)

    def never(*_: Any) -> None:
        raise AssertionError("there is nothing to bring up to date")

    monkeypatch.setattr(jsonfile, "upgraded", never)
    load(path)
