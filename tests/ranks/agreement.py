"""Runs on real gloo ranks, in processes of its own: prefills that fail, disagree or meet ranks that are gone.

``python -m tests.ranks.agreement FOLDER RANK RANKS`` runs the scenarios that ``FOLDER/scenarios.json`` names and
writes what this rank saw of each to ``FOLDER/seen<rank>.json``.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kvr_partition import Partition, PartitionTable
from kvr_partition.errors import RankError
from kvr_partition.runtime import (
    LinkLimits,
    decode,
    link_group,
    link_memory_use,
    prefill,
    probe,
    release_link_memory,
    renew,
    reserve_link_memory,
    single,
    stock,
    tsp,
    zigzag,
)
from kvr_partition.runtime.agreement import agreement_of
from kvr_partition.runtime.fused import chosen_layers
from kvr_partition.runtime.links.group import links_of
from kvr_partition.table import Entry
from tests.models import build
from tests.ranks.launch import rank_device

DEVICE = torch.device("cpu")
"""Of this rank; a GPU where the scenarios ask for one."""

WAIT_S = 4.0
"""Time-out of the worlds in which ranks come late."""

SPLITS = {2: (20, 12), 3: (14, 5, 13), 4: (12, 5, 7, 8), 5: (10, 4, 5, 6, 7)}
CONTEXT = 32


def prompt(number: int, batch: int = 1) -> torch.Tensor:
    """Seeded token ids ``[batch, CONTEXT]``."""
    return torch.randint(0, 257, (batch, CONTEXT), generator=torch.Generator().manual_seed(number)).to(DEVICE)


def said(error: BaseException) -> dict[str, Any]:
    """What an error tells, for the test to look at."""
    return {
        "error": type(error).__name__,
        "message": str(error),
        "rank": getattr(error, "rank", None),
        "kind": getattr(error, "kind", None),
        "phase": getattr(error, "phase", None),
    }


class World:
    """One rank of the world and its model."""

    def __init__(self, rank: int, ranks: int, folder: Path) -> None:
        self.rank, self.ranks, self.folder = rank, ranks, folder
        self.split = Partition(SPLITS[ranks])
        self.model = build("llama-gqa").to(DEVICE)
        probe(self.model)
        chosen_layers(self.model)
        self.right: dict[int, int] = {}

    def attempt(self, run: Callable[[], Any]) -> dict[str, Any]:
        """The token that ``run`` gives on the last rank, or its error."""
        try:
            out = run()
        except Exception as error:
            return said(error)
        token = getattr(out, "first_token", None)
        return {"token": None if token is None else int(token[0, 0])}

    def prefill(self, number: int, **changes: Any) -> dict[str, Any]:
        """A prefill of one prompt, otherwise than the others where ``changes`` say so."""
        model = changes.pop("model", self.model)
        split = changes.pop("split", self.split)
        ids = changes.pop("ids", None)
        return self.attempt(lambda: prefill(model, prompt(number) if ids is None else ids, split, **changes))

    def single(self, number: int) -> int:
        """The token that one rank gives."""
        if number not in self.right:
            token = stock(self.model, prompt(number)).first_token
            assert token is not None
            self.right[number] = int(token[0, 0])
        return self.right[number]

    @contextmanager
    def broken(self, layer: int, how: Callable[[], None]) -> Iterator[None]:
        """A model in which something happens once a layer is reached."""
        armed: list[bool] = []
        handle = self.model.model.layers[layer].register_forward_pre_hook(lambda *_: how() if armed else None)
        # A model with another hook is tried anew, and that is not the prefill in which it is to happen.
        chosen_layers(self.model)
        armed.append(True)
        try:
            yield
        finally:
            handle.remove()


def out_of_memory() -> None:
    """What a full device does."""
    raise torch.OutOfMemoryError("tried to allocate 20 GiB")


# ------------------------------------------------------------------ scenarios, each in step on all ranks


def failed_prefill(world: World) -> dict[str, Any]:
    """Rank 1 runs out of memory on a prompt; the next ones are not mixed up with it."""
    if world.rank == 1:
        with world.broken(1, out_of_memory):
            first = world.prefill(1)
    else:
        first = world.prefill(1)
    after = [world.prefill(number) for number in (2, 3)]
    renew()
    return {"first": first, "after": after, "renewed": world.prefill(4), "right": world.single(4)}


def failed_before_its_links(world: World) -> dict[str, Any]:
    """Rank 1 cannot even allocate its rows, so that nobody receives what rank 0 sends."""
    # The package has a function of the module's name.
    runtime: Any = import_module("kvr_partition.runtime.prefill")
    kept = runtime.chunk_cache
    if world.rank == 1:
        runtime.chunk_cache = lambda *_, **__: out_of_memory()
    first = world.prefill(1)
    runtime.chunk_cache = kept
    # The first rank of a chain may have done its part before it hears of it.
    after = world.prefill(2)
    renew()
    return {"first": first, "after": after, "renewed": world.prefill(4), "right": world.single(4)}


def first_of_all(world: World) -> dict[str, Any]:
    """Rank 1 fails in the very first prefill of the group, before anything was ever sent."""
    return failed_before_its_links(world)


def late_renewal(world: World) -> dict[str, Any]:
    """Rank 0 gives up on a renewal before the last rank comes to it, and all agree on the next one."""
    world.prefill(1)
    if world.rank == 1:
        with world.broken(1, out_of_memory):
            world.prefill(2)
    else:
        world.prefill(2)
    given_up = None
    if world.rank == world.ranks - 1:
        time.sleep(1.5 * WAIT_S)
    else:
        given_up = world.attempt(renew)
    again = world.attempt(renew)
    for _ in range(2):
        first = world.prefill(3)
        if world.rank == 1:
            with world.broken(1, out_of_memory):
                world.prefill(2)
        else:
            world.prefill(2)
        world.prefill(2)
        again = world.attempt(renew)
    return {
        "given_up": given_up,
        "again": again,
        "first": first,
        "next": world.prefill(4),
        "right": world.single(4),
    }


def threads_of_one_model(world: World) -> dict[str, Any]:
    """Two threads prefill in a group each, with one model."""
    groups = [dist.new_group(list(range(world.ranks))) for _ in range(2)]
    found: list[tuple[int, dict[str, Any]]] = []

    def work(group: Any, numbers: range) -> None:
        for number in numbers:
            found.append((number, world.prefill(number, group=group)))

    for number in range(200, 240):
        world.single(number)
    threads = [
        threading.Thread(target=work, args=(group, range(low, low + 20)))
        for group, low in zip(groups, (200, 220), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wrong = [
        number for number, one in found if one.get("token") is not None and one["token"] != world.single(number)
    ]
    return {"wrong": wrong, "next": world.prefill(7), "right": world.single(7)}


def another_past(world: World) -> dict[str, Any]:
    """The last rank holds the past of other tokens, the same number of them."""
    odd = world.rank == world.ranks - 1
    split = Partition(world.split.sizes, past=9)
    pasts = [stock(world.model, prompt(50 + other)[:, :9]).cache for other in (0, 1)]
    return {
        "first": world.prefill(11, past=pasts[int(odd)], split=split),
        "same": world.prefill(11, past=pasts[0], split=split),
        "next": world.prefill(11),
        "right": world.single(11),
    }


def another_order(world: World) -> dict[str, Any]:
    """The last rank reads two prompts in another order."""
    order = (6, 5) if world.rank == world.ranks - 1 else (5, 6)
    return {
        "both": [world.prefill(number) for number in order],
        "next": world.prefill(7),
        "right": world.single(7),
    }


def two_threads(world: World) -> dict[str, Any]:
    """Two threads of each rank prefill in one group."""
    found: list[tuple[int, dict[str, Any]]] = []

    def work(numbers: range) -> None:
        for number in numbers:
            found.append((number, world.prefill(number)))

    for number in range(100, 140):
        world.single(number)
    threads = [threading.Thread(target=work, args=(range(low, low + 20),)) for low in (100, 120)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wrong = [
        number for number, one in found if one.get("token") is not None and one["token"] != world.single(number)
    ]
    errors = sorted({one["kind"] for _, one in found if "kind" in one})
    world.attempt(renew)
    return {"wrong": wrong, "kinds": errors, "next": world.prefill(7), "right": world.single(7)}


def disagreements(world: World) -> dict[str, Any]:
    """The last rank differs in one thing after another; the group stays usable."""
    odd = world.rank == world.ranks - 1
    last = len(world.split.sizes) - 1
    moved = Partition([size + (at == 0) - (at == last) for at, size in enumerate(world.split.sizes)])
    with torch.random.fork_rng():
        torch.manual_seed(99)
        other_weights = build("llama-gqa")
        for parameter in other_weights.parameters():
            parameter.data.add_(1e-3)
    nearly = build("llama-gqa")
    nearly.model.layers[2].mlp.down_proj.weight.data[3, 5] += 1e-6
    # An even number of top bits cancels in a sum of products, unless words are mixed first.
    flipped = build("llama-gqa")
    for parameter in flipped.parameters():
        parameter.data.reshape(-1)[1::2] *= -1
    past = stock(world.model, prompt(50)[:, :4]).cache
    with_past = Partition(world.split.sizes, past=4)
    ways: dict[str, dict[str, Any]] = {
        "sizes": {"split": moved},
        "prompt": {"ids": prompt(12)},
        "one token": {"ids": prompt(11).index_fill(1, torch.tensor([CONTEXT - 1]), 3)},
        "batch": {"ids": prompt(11, batch=2)},
        "context": {
            "ids": prompt(11)[:, 1:],
            "split": Partition((*world.split.sizes[:-1], world.split.sizes[-1] - 1)),
        },
        "topology": {"topology": "fanout"},
        "limits": {"limits": LinkLimits(bandwidth=1e9)},
        "weights": {"model": other_weights},
        "one weight": {"model": nearly},
        "dtype": {"model": build("llama-gqa").to(torch.bfloat16)},
        "signs": {"model": flipped},
        "KV heads": {"model": build("llama-mha")},
        "layers": {"model": build("llama-gqa", num_hidden_layers=2)},
        "window": {"model": build("mistral-window")},
        "past": {"past": past, "split": with_past},
        "padding": {"attention_mask": torch.tensor([[0] * 3 + [1] * (CONTEXT - 3)])},
    }
    seen = {}
    for name, way in ways.items():
        seen[name] = world.prefill(11, **(way if odd else {}))
        seen[f"after {name}"] = world.prefill(11)
    return {"seen": seen, "right": world.single(11)}


def refusals(world: World) -> dict[str, Any]:
    """What one rank refuses, none runs; what all refuse is everybody's own error."""
    odd = world.rank == 1
    table = PartitionTable([Entry(64, (64 - world.ranks + 1, *[1] * (world.ranks - 1)))])
    return {
        "one": world.prefill(11, **({"split": table} if odd else {})),
        "all": world.prefill(11, split=table),
        "list": world.prefill(11, split=list(world.split.sizes)),
        "next": world.prefill(11),
        "right": world.single(11),
    }


def other_methods(world: World) -> dict[str, Any]:
    """The baselines agree in the same way."""
    seen = {}
    for name, method in (("tsp", tsp), ("zigzag", zigzag)):
        odd = prompt(22 if world.rank == 1 else 21)
        seen[name] = world.attempt(lambda method=method, odd=odd: method(world.model, odd))
        seen[f"{name} again"] = world.attempt(lambda method=method: method(world.model, prompt(21)))
    method = zigzag if world.rank == 0 else tsp
    seen["two methods"] = world.attempt(lambda: method(world.model, prompt(21)))
    return {"seen": seen, "next": world.prefill(21), "right": world.single(21)}


def without_agreement(world: World) -> dict[str, Any]:
    """Switched off by name: no comparison, and still no message of one prefill taken for another's."""
    first = world.prefill(31, agree=False)
    return {"first": first, "right": world.single(31)}


def own_messages(world: World) -> dict[str, Any]:
    """Messages of the program's own, with the very tags that links use, are nobody else's."""
    message = torch.full((CONTEXT * 128,), 7.0)
    works = []
    if world.rank == 0:
        works = [dist.isend(message, dst=1, tag=tag) for tag in range(12)]
    first = world.prefill(41)
    if world.rank == 1:
        arrived = [torch.zeros_like(message) for _ in range(12)]
        for tag, buffer in enumerate(arrived):
            dist.recv(buffer, src=0, tag=tag)
        first["arrived"] = all(bool((buffer == 7).all()) for buffer in arrived)
    for work in works:
        work.wait()
    return {"first": first, "right": world.single(41)}


def subgroup(world: World) -> dict[str, Any]:
    """Two of three ranks prefill by themselves, in a group whose ranks are counted anew."""
    group = dist.new_group([1, 2])
    if world.rank == 0:
        return {}
    split = Partition((20, 12))
    odd = prompt(52 if world.rank == 2 else 51)
    return {
        "first": world.prefill(51, split=split, group=group),
        "odd": world.prefill(51, split=split, group=group, ids=odd),
        "right": world.single(51),
    }


def killed(world: World) -> dict[str, Any]:
    """Rank 1 is killed in a layer."""
    if world.rank == 1:
        with world.broken(1, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            world.prefill(1)
    return {"first": world.prefill(1), "after": world.prefill(2), "renewed": world.attempt(renew)}


def flood() -> None:
    """More kernels than a stream takes: the host waits until the stream has come to some of them."""
    numbers = torch.zeros(1, device=DEVICE)
    for _ in range(5000):
        numbers.add_(1)


def killed_behind_a_full_stream(world: World) -> dict[str, Any]:
    """Rank 1 is killed in a layer, when the host of the last rank is held up by its own stream."""
    world.prefill(1)
    if world.rank == 1:
        with world.broken(1, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            world.prefill(2)
    if world.rank == world.ranks - 1:
        with world.broken(2, flood):
            return {"first": world.prefill(2)}
    return {"first": world.prefill(2)}


def goes_on_without_the_dead(world: World) -> dict[str, Any]:
    """Rank 1 is killed in a layer; the others make a world of their own and read prompts in that."""
    found = killed(world)
    dist.destroy_process_group()
    survivors = [rank for rank in range(world.ranks) if rank != 1]
    dist.init_process_group(
        "gloo",
        init_method=(world.folder / "meet-again").as_uri(),
        rank=survivors.index(world.rank),
        world_size=len(survivors),
        timeout=timedelta(seconds=60),
    )
    split = Partition(SPLITS[len(survivors)])
    return {
        **found,
        "next": [world.prefill(number, split=split) for number in (3, 4)],
        "right": [world.single(number) for number in (3, 4)],
    }


def early(world: World) -> dict[str, Any]:
    """Rank 0 stays in its second layer until the last rank has read the KV of the first one, from all ranks."""
    seen: dict[str, Any] = {"right": world.single(61)}
    for topology in ("chain", "fanout"):
        there = world.folder / f"there-{topology}"

        def arrived(there: Path = there) -> None:
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            there.touch()

        def wait(there: Path = there) -> None:
            until = time.monotonic() + 20
            while not there.exists():
                assert time.monotonic() < until, "the KV of the first layer did not come before the others"
                time.sleep(0.01)

        if world.rank == 0:
            with world.broken(1, wait):
                seen[topology] = world.prefill(61, topology=topology)
        elif world.rank == world.ranks - 1:
            with world.broken(1, arrived):
                seen[topology] = world.prefill(61, topology=topology)
        else:
            seen[topology] = world.prefill(61, topology=topology)
    return seen


def mixed_lengths(world: World) -> dict[str, Any]:
    """Prompts of many lengths and batches, one after the other, decoded on while others are read."""
    wrong: list[int] = []
    kept: list[Any] = []
    lengths = torch.randint(world.ranks, 48, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    for number, length in enumerate(lengths):
        ids = torch.randint(0, 257, (1 + number % 3, length), generator=torch.Generator().manual_seed(number))
        ids = ids.to(DEVICE)
        out = prefill(world.model, ids, Partition.even(length, world.ranks), reserve=16)
        if out.is_last:
            kept = [*kept[-3:], (ids, out)]
            # The prompt before the last one: its rows are still its own, though another prompt was read since.
            before, result = kept[0]
            if len(kept) == 4:
                right = stock(world.model, before)
                same = torch.equal(decode(world.model, before, result, 16), decode(world.model, before, right, 16))
                wrong += [] if same else [number]
    return {"wrong": wrong}


def link_memory_is_kept(world: World) -> dict[str, Any]:
    """Memory that peers write to: set aside once, the same for prompt after prompt, and given back."""
    reserved = reserve_link_memory(world.model, 64)
    uses = []
    for number in range(70, 90):
        world.prefill(number)
        uses.append(link_memory_use())
    kept = prefill(world.model, prompt(90), world.split)
    while_alive, nothing = link_memory_use(), release_link_memory()
    del kept
    given_back = release_link_memory()
    return {
        "reserved": reserved.reserved_bytes,
        "flat": len({use.reserved_bytes for use in uses}) == 1,
        "used_while_alive": while_alive.used_bytes,
        "given_back_while_alive": nothing,
        "given_back": given_back,
        "left": link_memory_use().reserved_bytes,
        "next": world.prefill(91),
        "right": world.single(91),
    }


def kinds(world: World) -> dict[str, Any]:
    """Groups over each kind of link, one of them over both."""
    found: dict[str, Any] = {"right": world.single(92)}
    for name, wanted in (("auto", "auto"), ("nccl", "nccl"), ("mixed", "nccl" if world.rank == 1 else "auto")):
        group = link_group(links=wanted)  # type: ignore[arg-type]
        found[f"{name} link"] = links_of(group, DEVICE).link
        for topology in ("chain", "fanout"):
            found[f"{name} {topology}"] = world.prefill(92, group=group, topology=topology)
    return found


def struck_first(world: World, by: signal.Signals) -> dict[str, Any]:
    """The first rank gets a signal in a layer, once links have been used."""
    world.prefill(1)
    if world.rank == 0:
        with world.broken(1, lambda: os.kill(os.getpid(), by)):
            world.prefill(2)
    return {"first": world.prefill(2)}


def first_killed(world: World) -> dict[str, Any]:
    """The first rank is killed in a layer."""
    return struck_first(world, signal.SIGKILL)


def stopped(world: World) -> dict[str, Any]:
    """The first rank is stopped in a layer; all others wait for it, directly or not."""
    return struck_first(world, signal.SIGSTOP)


def late(world: World) -> dict[str, Any]:
    """Rank 1 comes to a prefill when nobody waits for it any more, and is well otherwise."""
    world.prefill(2)
    if world.rank == 1:
        time.sleep(6)
        return {"first": world.prefill(1)}
    return {"first": world.prefill(1)}


def not_finite(world: World) -> dict[str, Any]:
    """A weight of the second layer is NaN on all ranks."""
    model = build("llama-gqa").to(DEVICE)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    return {
        "first": world.prefill(1, model=model),
        "tsp": world.attempt(lambda: tsp(model, prompt(1))),
        "single": world.attempt(lambda: single(model, prompt(1))),
        "next": world.prefill(1),
        "right": world.single(1),
    }


def fuzz(world: World, sequences: int = 300, seed: int = 0) -> dict[str, Any]:
    """Random sequences of good, failing and disagreeing prefills: no token that one rank would not give."""
    draw = torch.Generator().manual_seed(seed)

    def random(below: int) -> int:
        return int(torch.randint(0, below, (1,), generator=draw))

    counts = {"right": 0, "wrong": 0, "raised": 0}
    usable = True
    for _ in range(sequences):
        number, what, who, layer = random(1000), random(8), random(world.ranks), random(3)
        cut = 1 + random(CONTEXT - world.ranks)
        sizes = [cut, *[1] * (world.ranks - 2), CONTEXT - cut - (world.ranks - 2)]
        changes: dict[str, Any] = {"split": Partition(sizes)}
        me = world.rank == who
        if what == 1 and me:
            changes["ids"] = prompt(number + 1)
        elif what == 2 and me:
            changes["split"] = Partition(sizes[::-1])
        elif what == 3 and me:
            changes["topology"] = "fanout"
        elif what == 4 and me:
            changes["split"] = [1, 2]
        if what in (5, 6) and me:
            with world.broken(layer, out_of_memory):
                found = world.prefill(number, **changes)
        else:
            found = world.prefill(number, **changes)
        token = found.get("token")
        if "error" in found:
            counts["raised"] += 1
        if token is not None:
            read = number + 1 if what == 1 and me else number
            counts["right" if token == world.single(read) else "wrong"] += 1
        usable = usable and what not in (5, 6)
        # Now and then nobody minds that a prefill failed, and everybody tries the next one.
        if not usable and random(2) == 0:
            renew()
            usable = True
    return counts


def long_fuzz(world: World) -> dict[str, Any]:
    """The same, 2,000 sequences."""
    return fuzz(world, 2000, seed=1)


def main() -> None:
    """One rank."""
    folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    asked = json.loads((folder / "scenarios.json").read_text())
    global DEVICE
    DEVICE = rank_device(asked["device"], rank)
    # Some machines need longer to start than a world may take to meet.
    (folder / f"started{rank}").touch()
    while not all((folder / f"started{other}").exists() for other in range(ranks)):
        time.sleep(0.01)
    eager = {"device_id": DEVICE} if asked["device"] == "cuda" and asked.get("eager") else {}
    dist.init_process_group(
        "nccl" if asked["device"] == "cuda" else "gloo",
        init_method=(folder / "meet").as_uri(),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=asked["timeout_s"]),
        **eager,
    )
    world = World(rank, ranks, folder)
    seen = {}
    for name in asked["names"]:
        began = time.perf_counter()
        # Where ranks wait for one another, only where each of them stands tells why.
        faulthandler.dump_traceback_later(0.75 * asked["timeout_s"])
        seen[name] = globals()[name](world)
        faulthandler.cancel_dump_traceback_later()
        seen[name]["seconds"] = time.perf_counter() - began
        (folder / f"seen{rank}.json").write_text(json.dumps(seen))
    with suppress(RankError):
        # A rank that leaves while others are still in its last prompt is one that died, to them.
        agreement_of(None).barrier()
    # Where ranks are missing there is nobody to say goodbye to.
    os._exit(0)


if __name__ == "__main__":
    main()
