"""Each kind of link is described and made in one place each, and none is forgotten in the other."""

from __future__ import annotations

from typing import get_args

import pytest

from kvr_partition.link_kinds import BETWEEN_GPUS, COPIES, GLOO, KINDS, NCCL, PEER, LinkKind, kind_of
from kvr_partition.runtime.links.group import PAIRED, WIRES, LinkSetup, WantedLinks
from profiler.checks import LINKS


def test_every_kind_between_gpus_can_be_found_made_and_asked_for() -> None:
    assert set(KINDS) == {*BETWEEN_GPUS, GLOO, COPIES}
    assert set(WIRES) == set(PAIRED) == set(BETWEEN_GPUS)
    assert LINKS == get_args(WantedLinks) == ("auto", *(kind.name for kind in BETWEEN_GPUS))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_provenance_says_leads_back_to_the_kind(kind: LinkKind) -> None:
    assert kind_of(f"{kind.name}, held to 10 GB/s") is kind
    assert kind_of(f"simulated {kind.name}") is kind


def test_of_two_kinds_the_slower_one_tells() -> None:
    setup = LinkSetup(0, 3, {(0, 1): PEER, (0, 2): NCCL, (1, 2): NCCL})
    assert setup.link == "peer and nccl"
    assert kind_of(setup.link) is NCCL
    with pytest.raises(KeyError):
        kind_of("carrier pigeons")


def test_the_topology_is_what_suits_all_links_unless_one_is_asked_for() -> None:
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert LinkSetup(0, 3, dict.fromkeys(pairs, PEER)).topology("auto") == "fanout"
    assert LinkSetup(0, 3, {**dict.fromkeys(pairs, PEER), (0, 2): NCCL}).topology("auto") == "chain"
    assert LinkSetup(0, 3, dict.fromkeys(pairs, GLOO)).topology("auto") == "chain"
    assert LinkSetup(0, 3, dict.fromkeys(pairs, PEER)).topology("chain") == "chain"
    assert LinkSetup(0, 1, {}).topology("auto") == "chain"
