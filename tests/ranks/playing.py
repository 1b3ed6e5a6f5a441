"""Scenarios of real ranks, played, and what they must have told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.ranks.launch import launch

Seen = list[dict[str, Any]]
"""What each rank saw of one scenario."""


def play(
    folder: Path,
    ranks: int,
    names: list[str],
    *,
    timeout_s: float = 60,
    missing: int | None = None,
    device: str = "cpu",
    eager: bool = False,
) -> Any:
    """Run scenarios on real ranks; what each rank saw of each, by name.

    Args:
        timeout_s: of the process group.
        device: of the ranks, see `rank_device`.
        eager: whether a world over NCCL is made for one device.
        missing: a rank that does not live to tell; it is ended once all others have told.
    """
    (folder / "scenarios.json").write_text(
        json.dumps({"names": names, "timeout_s": timeout_s, "device": device, "eager": eager})
    )
    launch("tests.ranks.agreement", folder, ranks, timeout_s=250, missing=missing)
    told = [
        {} if rank == missing else json.loads((folder / f"seen{rank}.json").read_text()) for rank in range(ranks)
    ]
    return {name: [one.get(name, {}) for one in told] for name in names}


def right(seen: Seen, key: str = "next") -> None:
    """The last rank has the token that one rank gives."""
    assert [one[key].get("token", one[key]) for one in seen] == [None] * (len(seen) - 1) + [seen[-1]["right"]]


def all_told(told: list[dict[str, Any]], kind: str, *words: str) -> None:
    """Every rank has the same `RankError`."""
    assert {one.get("error") for one in told} == {"RankError"}, told
    assert len({one["message"] for one in told}) == 1
    assert {one["kind"] for one in told} == {kind}
    for word in words:
        assert word in told[0]["message"]
