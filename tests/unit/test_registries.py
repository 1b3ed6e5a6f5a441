"""What each registry says of its entries is true of them, and an option for ranks reaches the ranks."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import msgspec
import pytest
import torch

import profiler.life
from kvr_partition.cli.options import add_ranks, make_group
from kvr_partition.dtypes import DTYPES
from kvr_partition.search import search
from kvr_partition.search.samplers import SAMPLERS
from kvr_partition.training import REGRESSORS
from profiler.life import Ranks
from profiler.messages import Setup
from tests.landscapes import FITTED, measured
from tests.models import write_folder
from tests.rows import rows


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_is_torchs_and_its_reference_is_more_precise(name: str) -> None:
    said, info = DTYPES[name], torch.finfo(getattr(torch, name))
    assert (said.nbytes, said.epsilon) == (getattr(torch, name).itemsize, info.eps)
    assert torch.finfo(getattr(torch, said.reference)).eps < info.eps


@pytest.mark.parametrize("name", [name for name, kind in SAMPLERS.items() if kind.corrects])
def test_a_sampler_that_corrects_a_machine_ends_by_itself(name: str) -> None:
    found = search(lambda split: measured(split, FITTED), 4096, 3, 40, sampler=name, machine=FITTED)
    assert found.stopped == "converged"


@pytest.mark.parametrize(
    ("method", "parameter"), [(method, one) for method, way in REGRESSORS.items() for one in way.space]
)
def test_a_way_to_predict_takes_what_can_be_tuned(method: str, parameter: str) -> None:
    low, high, _ = REGRESSORS[method].space[parameter]
    for value in (low, high):
        REGRESSORS[method](**{parameter: value}).fit([*rows(4), *rows(5)])


UNUSUAL = {
    "ranks": "3",
    "backend": "cuda",
    "dtype": "float16",
    "depth": "attention",
    "layers": "stock",
    "threads": "2",
    "topology": "fanout",
    "links": "nccl",
    "bandwidth": "5GB/s",
    "batch": "2",
    "seed": "7",
    "timeout": "11",
}
"""An option for ranks, and a value that it does not have by itself."""


def test_every_option_for_ranks_reaches_the_group_and_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = argparse.ArgumentParser()
    add_ranks(parser)
    options = {action.dest for action in parser._actions} - {"help"}
    assert options == {*UNUSUAL, "model", "profile"}, "name an unusual value here"

    monkeypatch.setattr(profiler.life, "choose_backend", lambda asked, ranks: asked.replace("auto", "cpu"))
    model = ["--model", str(write_folder(tmp_path / "llama", "llama-gqa"))]
    usual = make_group(parser.parse_args([]))
    other = make_group(parser.parse_args([*model, *(f"--{name}={value}" for name, value in UNUSUAL.items())]))
    fields = [field.name for field in dataclasses.fields(Ranks) if field.init]
    assert {name for name in fields if getattr(usual, name) == getattr(other, name)} == {
        "profile", "log", "noise_seed",
    }  # fmt: skip

    other.noise_seed = 5
    mine, theirs = usual._setups("a", ["cpu", "cpu"])[0], other._setups("b", ["cuda:1", "cuda:2", "cuda:3"])[0]
    names = [field.name for field in msgspec.structs.fields(Setup)]
    assert {name for name in names if getattr(mine, name) == getattr(theirs, name)} == {"rank", "scratch"}
