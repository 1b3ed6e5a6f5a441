"""Every causal language-model family of the installed transformers, split over three ranks.

    python -m benchmarks.families
    python -m benchmarks.families --only llama,gemma2,mpt --out families.json

A small model of each family (tests/families.py) reads a prompt in uneven chunks, with and without tokens
cached before it, and decodes on; so do two prompts at once, one of them padded on the left. What comes out is
compared with what the stock model's own ``generate`` gives on one rank. A line for each family says one of

    exact           logits and decoded tokens are the same; "no padding" where padded prompts are refused
    refused         kvr_partition said by name why it does not split this family
    WRONG           other logits or other tokens
    CRASHED         an error that kvr_partition did not raise on purpose, though the stock model runs
    HUNG            no answer in time, or a refusal on one rank while others wait for it
    not buildable   transformers itself does not build or run a small model

and besides, as ``pieces`` and ``padding``, whether the stock model with its own cache is exact when it reads a
prompt in two pieces, and a left-padded batch in two pieces under an attention mask.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from tests.families import FIRST_TOKEN, VOCABULARY, build, names

SIZES = (5, 23, 12)
NEW_TOKENS = 12
PADS = 9
CUT = 17
TOLERANCE = 1e-4
RANKS = len(SIZES)
# Ranks whose neighbour failed get this long to say what they know.
GRACE_S = 5.0


@dataclass(frozen=True)
class Case:
    """A way to read the prompt: chunks behind cached tokens, how many prompts at once, and how deep."""

    sizes: tuple[int, ...]
    past: int = 0
    batch: int = 1
    depth: Literal["auto", "cache"] = "auto"
    padded: bool = False


PADDED = "two prompts, one of them padded"
CASES = {
    "a prompt": Case(SIZES),
    "behind 13 cached tokens": Case((1, 25, 1), past=13),
    "two prompts at cache depth": Case(SIZES, batch=2, depth="cache"),
    PADDED: Case(SIZES, batch=2, padded=True),
}
BAD = ("WRONG", "CRASHED", "HUNG")
OUTCOMES = ("exact", "refused", *BAD, "not buildable")


@dataclass
class Finding:
    """What came out for a family.

    Attributes:
        outcome: one of `OUTCOMES`.
        detail: the depth, or what went wrong in which case.
        pieces, padding: the stock model alone, see the module.
        generate_differs: how far the first logits of the stock model's own ``generate`` are from those of a plain
            forward pass: some models are given positions there that they would not make themselves.
        prefix_matters: how much the logits change when the last chunk does not see what is before it.
        different_tokens: how many of the decoded tokens differ from one another.
        seconds: all in all.
    """

    name: str
    outcome: str = ""
    detail: str = ""
    pieces: str = ""
    padding: str = ""
    generate_differs: float = float("nan")
    prefix_matters: float = float("nan")
    different_tokens: int = 0
    seconds: float = 0.0
    where: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """One line about it."""
        stock = f"pieces: {self.pieces}, padding: {self.padding}" if self.padding else ""
        return f"{self.name:27}{f'{self.outcome}: {self.detail}':60}  {stock}".rstrip()


def main() -> None:
    """Sweep and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME,...", help="these families; all without it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what was found as JSON, too")
    parser.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="for a family; then it is HUNG")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else names()
    unknown = set(chosen) - set(names())
    if unknown:
        parser.error(f"unknown families: {', '.join(sorted(unknown))}")
    findings = []
    for finding in sweep(chosen, options.limit):
        findings.append(finding)
        print(finding.line, flush=True)
    counts = Counter(finding.outcome for finding in findings)
    print(", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES), f"of {len(findings)} families")
    if options.out:
        versions = {name: version(name) for name in ("torch", "transformers")}
        found = [asdict(finding) for finding in findings]
        options.out.write_text(json.dumps({"versions": versions, "counts": counts, "families": found}, indent=1))
    sys.exit(any(counts[outcome] for outcome in BAD))


def sweep(families: Sequence[str], limit_s: float = 60) -> Iterator[Finding]:
    """Findings of one family after another; ranks that hang or may be out of step are started anew."""
    group: Group | None = None
    try:
        for name in families:
            group = group or Group()
            begun = time.monotonic()
            finding = examine(group, name, begun + limit_s)
            finding.seconds = round(time.monotonic() - begun, 2)
            if group.unfit:
                group.close()
                group = None
            yield finding
    finally:
        if group is not None:
            group.close()


def examine(group: Group, name: str, deadline: float) -> Finding:
    """One family on ranks that are ready."""
    finding = Finding(name)
    replies = group.ask(("prepare", name), deadline)
    if None in replies:
        return _ended(finding, "not buildable", "the stock model does not answer in time, or ends its process")
    by_rank = [reply for reply in replies if reply is not None]
    for reply in by_rank:
        if "error" in reply:
            finding.where = reply["error"]["where"]
            return _ended(finding, "not buildable", reply["error"]["text"])
    for reply in by_rank:
        for key, value in reply.items():
            if hasattr(finding, key):
                setattr(finding, key, value)
    details: list[str] = []
    for case in CASES:
        replies = group.ask(("run", case), deadline)
        outcome, detail, where = _judge(replies)
        if outcome == "refused" and case == PADDED:
            # Prompts of one length are still read right.
            details[0] += ", no padding"
            continue
        if outcome != "exact":
            finding.where = where
            if any(not (reply or {}).get("in_step", False) for reply in replies):
                group.unfit = True
            return _ended(finding, outcome, detail if outcome == "refused" else f"{case}: {detail}")
        details.append(detail)
    return _ended(finding, "exact", details[0])


def _ended(finding: Finding, outcome: str, detail: str) -> Finding:
    finding.outcome, finding.detail = outcome, detail
    return finding


def _judge(replies: Sequence[dict[str, Any] | None]) -> tuple[str, str, list[str]]:
    """Outcome, detail and where in the code, of one case on all ranks."""
    errors = [reply["error"] for reply in replies if reply is not None and "error" in reply]
    crashes = [error for error in errors if not error["on_purpose"]]
    if crashes:
        # The first to fail takes others down by closing its connections; those say little.
        crashes.sort(key=lambda error: "onnection" in error["text"])
        return "CRASHED", crashes[0]["text"], crashes[0]["where"]
    if None in replies:
        silent = [str(rank) for rank, reply in enumerate(replies) if reply is None]
        said = f"; others: {errors[0]['text']}" if errors else ""
        return "HUNG", f"rank {', '.join(silent)} did not answer{said}", []
    if errors:
        return "refused", errors[0]["message"], errors[0]["where"]
    last = replies[-1] or {}
    if not last["logits_error"] < TOLERANCE:
        return "WRONG", f"logits at {last['depth']} depth differ by {last['logits_error']:.1e}", []
    if last["wrong_token"] is not None:
        return "WRONG", f"decoded token {last['wrong_token']} differs, after exact logits", []
    decoded = "decodes" if last["decoded"] else f"not decoded: {last['why_not']}"
    return "exact", f"{last['depth']} depth, {decoded}", []


class Group:
    """Ranks that are kept warm over many families.

    Attributes:
        unfit: whether they hang or may be out of step with one another.
    """

    def __init__(self) -> None:
        self.unfit = False
        self._folder = tempfile.TemporaryDirectory()
        os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        # A server that has imported everything forks ranks in no time, so starting anew costs little.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.families", "kvr_partition.runtime", "transformers.generation"])
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def ask(self, request: tuple[str, str], deadline: float) -> list[dict[str, Any] | None]:
        """Replies of all ranks; None of those that give none until the deadline."""
        replies: list[dict[str, Any] | None] = [None] * RANKS
        open_ones = dict(zip(self._connections, range(RANKS), strict=True))
        for connection in open_ones:
            connection.send(request)
        while open_ones and (ready := wait(list(open_ones), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = open_ones.pop(connection)
                try:
                    reply: dict[str, Any] = connection.recv()
                except (EOFError, ConnectionError):
                    reply = {"error": {"text": f"rank {rank} died", "on_purpose": False, "where": []}}
                replies[rank] = reply
                if "error" in reply:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        self.unfit |= bool(open_ones) or any(
            "died" in (reply or {}).get("error", {}).get("text", "") for reply in replies
        )
        return replies

    def close(self) -> None:
        """End all ranks."""
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()
        self._folder.cleanup()


def serve(rank: int, folder: str, connection: Connection) -> None:
    """A rank: prepares a family, runs its cases, says what it found."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # What models print is not about what is looked for here.
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    dist.init_process_group("gloo", init_method=(Path(folder) / "meet").as_uri(), rank=rank, world_size=RANKS)
    prepared = None
    while True:
        try:
            what, name = connection.recv()
        except EOFError:
            return
        reply: dict[str, Any] = {}
        try:
            if what == "prepare":
                prepared = Prepared(name)
                reply = prepared.stock(rank)
            else:
                assert prepared is not None
                prepared.run(rank, CASES[name], reply)
        except Exception as error:  # whatever it is, it is what is asked for
            reply["error"] = told(error)
        connection.send(reply)


def told(error: Exception) -> dict[str, Any]:
    """An error as others may read it."""
    from kvr_partition.errors import KVRError, RankError

    message = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    return {
        # That a rank failed, or disagrees, is no refusal.
        "on_purpose": isinstance(error, KVRError) and not isinstance(error, RankError),
        "message": message,
        "text": f"{type(error).__name__}: {message[:300]}",
        "where": [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}" for frame in frames],
    }


class Prepared:
    """A family's model on one rank."""

    def __init__(self, name: str) -> None:
        import torch

        self.model = build(name)
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(FIRST_TOKEN, VOCABULARY, (2, sum(SIZES)), generator=generator)
        # What is right for prompts of one length, and for padded ones: logits, and tokens where there are any.
        self.right: dict[bool, tuple[Any, Any]] = {}
        self.why_not = ""
        self.mask = torch.ones_like(self.ids)
        self.mask[0, :PADS] = 0

    def stock(self, rank: int) -> dict[str, Any]:
        """What the stock model gives, on one rank, and what it does in pieces, on another."""
        import torch

        if rank == 0:
            return {"pieces": self._try(self._pieces), "padding": self._try(self._padding)}
        if rank < RANKS - 1:
            return {}
        plain = self._forward(self.ids)[:, -1]
        alone = self._forward(self.ids[:, -SIZES[-1] :])[:, -1]
        self.right[False] = (plain, None)
        said: dict[str, Any] = {"prefix_matters": relative(alone, plain)}
        try:
            logits, tokens = self.right[False] = self._generate(torch.ones_like(self.ids))
            self.right[True] = self._generate(self.mask)
        except Exception as error:  # then there is nothing to compare decoding with
            self.why_not = f"stock generate fails ({told(error)['text'][:100]})"
            return said
        different = {len(set(row)) for row in tokens.tolist()}
        return {**said, "generate_differs": relative(logits, plain), "different_tokens": max(different)}

    def run(self, rank: int, case: Case, reply: dict[str, Any]) -> None:
        """One case on this rank; the last rank compares."""
        from kvr_partition import Partition
        from kvr_partition.runtime import decode, prefill, probe

        # Until here no rank waits for another.
        reply["in_step"] = True
        support = probe(self.model)
        ids, before = self.ids[: case.batch], None
        if case.past:
            before = self._cache()
            self._forward(ids[:, : case.past], past_key_values=before, **self._positions(0, case.past))
        reply["in_step"] = False
        partition = Partition(case.sizes, case.past)
        mask = self.mask if case.padded else None
        out = prefill(
            self.model, ids[:, case.past :], partition, past=before, depth=case.depth, attention_mask=mask
        )
        reply["in_step"] = True
        if rank < RANKS - 1:
            return
        reply["depth"] = support.choose(case.depth)
        if case.padded and True not in self.right:
            reply.update(logits_error=0.0, decoded=False, why_not=self.why_not, wrong_token=None)
            return
        logits, tokens = self.right[case.padded]
        reply["logits_error"] = relative(out.logits, logits[: case.batch])
        reply["decoded"], reply["why_not"] = tokens is not None, self.why_not
        reply["wrong_token"] = None
        if tokens is not None and reply["logits_error"] < TOLERANCE:
            # The prompt alone, as it was read; what is cached before it was somebody else's.
            found, right = decode(self.model, ids[:, case.past :], out, NEW_TOKENS), tokens[: case.batch]
            same = [
                bool((found[:, at] == right[:, at]).all()) for at in range(min(found.shape[1], right.shape[1]))
            ]
            if not all(same) or found.shape != right.shape:
                reply["wrong_token"] = same.index(False) if False in same else len(same)

    def _cache(self) -> Any:
        from transformers.cache_utils import DynamicCache

        return DynamicCache(config=self.model.config)

    def _forward(self, ids: Any, **extra: Any) -> Any:
        import torch

        if "past_key_values" in extra:
            extra["use_cache"] = True
        with torch.no_grad():
            return self.model(input_ids=ids, **extra).logits

    def _positions(self, start: int, end: int) -> dict[str, Any]:
        """Positions as ``generate`` gives them, for models that take them."""
        import torch

        taken = "position_ids" in inspect.signature(self.model.forward).parameters
        return {"position_ids": torch.arange(start, end)[None]} if taken else {}

    def _generate(self, mask: Any) -> tuple[Any, Any]:
        """First logits and new tokens of the stock model's own ``generate``."""
        whole = self.model.generate(
            self.ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return whole.logits[0], whole.sequences[:, self.ids.shape[1] :]

    def _try(self, check: Callable[[], float]) -> str:
        try:
            error = check()
        except Exception as error:
            return f"crash ({told(error)['text'][:100]})"
        return "exact" if error < TOLERANCE else f"differs by {error:.1e}"

    def _pieces(self) -> float:
        cache = self._cache()
        self._forward(self.ids[:, :CUT], past_key_values=cache)
        return relative(self._forward(self.ids[:, CUT:], past_key_values=cache), self._forward(self.ids)[:, CUT:])

    def _padding(self) -> float:
        import torch

        ids = self.ids.clone()
        mask = torch.ones_like(ids)
        ids[0, :PADS], mask[0, :PADS] = 0, 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters

        def read(start: int, end: int, cache: Any) -> Any:
            extra = {"position_ids": positions[:, start:end]} if takes_positions else {}
            return self._forward(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, **extra)

        cache = self._cache()
        first, second = read(0, CUT, cache), read(CUT, ids.shape[1], cache)
        whole = read(0, ids.shape[1], self._cache())
        # What comes out for padding means nothing.
        real = mask[:, :CUT].bool()
        return max(relative(first[real], whole[:, :CUT][real]), relative(second, whole[:, CUT:]))


def relative(found: Any, right: Any) -> float:
    """Largest difference as a share of the largest value; infinite for NaN or another shape."""
    if found.shape != right.shape or not found.isfinite().all():
        return float("inf")
    return float((found - right).abs().max() / right.abs().max())


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
