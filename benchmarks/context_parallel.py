"""PyTorch's own context parallelism beside zigzag and KV-Runahead: one process group, all methods interleaved.

``torch.distributed.tensor.experimental.context_parallel`` shards token ids and positions over the ranks and turns
each call of SDPA into ring attention, so it runs unchanged models of transformers. It is timed with both ways of
rotating KV (``alltoall``, ``allgather``), each with torch's load balance (``balanced``: a rank has one chunk from
the front and one from the back, as in zigzag) and without it (``in order``), each with the SDPA kernels that are
asked for. It runs with ``use_cache=False``: unlike zigzag and KV-Runahead it ends without any KV to decode from,
which saves it the writing of that. ``one rank, no cache`` tells how much this is on one rank.

Each method is verified first, at a short context: same first token as stock transformers on one rank, and logits
as close as theirs, within rounding, to a run in higher precision on the same weights. What fails there or cannot
run at all is not timed; the reason stands in the file under ``left_out``.

    torchrun --nproc-per-node 2 -m benchmarks.context_parallel --model llama-7b --contexts 4096,16384 \\
        --dtype float16 --samples 9 --split 9728,6656 --out data/h100-sxm/llama-7b/context-parallel-2-ranks.json

TTFT is from a barrier until the token id is on the host of the rank that has the prompt's last token.
``--device cpu`` is a test of this script and no baseline: torch has no ring for its CPU kernel, and gets one here.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import random
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - what torch patches is this module's attribute
import transformers
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_inside
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.agreement import conditions
from kvr_partition.certificate import Deviation
from kvr_partition.cli.options import model_folder
from kvr_partition.dtypes import DTYPES
from kvr_partition.errors import NotFiniteError, PartitionError
from kvr_partition.measurement import median
from kvr_partition.partition import Partition
from kvr_partition.runtime import (
    PrefillResult,
    link_group,
    prefill,
    probe,
    release_link_memory,
    renew,
    zigzag,
)
from kvr_partition.runtime.agreement import agreement_of
from kvr_partition.runtime.kernels import planning
from kvr_partition.runtime.loading import first_line
from kvr_partition.runtime.one_rank import stock as stock_prefill
from kvr_partition.runtime.replacing import runahead_attention
from kvr_partition.runtime.verify import reference_dtype, run_reference, run_single
from profiler.models import build_model, open_model

WARMUP = 2
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ONE_RANK = "one rank"

STOCK_SDPA = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Outcome:
    """What a method left on this rank; token and logits are None where the prompt's last token is elsewhere.

    Attributes:
        ended: when the token was on the host, by the clock that the barrier was read from.
    """

    ended: float
    token: int | None = None
    logits: torch.Tensor | None = None


@dataclass(frozen=True)
class Method:
    """One way to read a prompt.

    Attributes:
        run: this rank's part of it, on the clock.
        around: settings that it needs, made before the clock starts.
        fits: why it cannot read so many tokens; None where it can.
        ours: whether a failure makes the group of our prefills unusable.
    """

    name: str
    run: Callable[[torch.Tensor], Outcome]
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    fits: Callable[[int], str | None] = lambda context: None
    ours: bool = False


@dataclass(frozen=True)
class Sample:
    """One run of a method, the same on every rank: TTFT, token and logits, or why there are none."""

    seconds: float
    token: int | None
    logits: torch.Tensor | None
    failure: str | None


class World:
    """The ranks, their model, and the ways to read a prompt with them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.cuda = options.device == "cuda"
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.cuda else torch.device("cpu")
        # A rank that fails alone in the middle of a collective leaves the others in it: that ends the run.
        timeout = datetime.timedelta(minutes=2)
        if self.cuda:
            torch.cuda.set_device(self.device)
            dist.init_process_group("nccl", timeout=timeout, device_id=self.device)
        else:
            dist.init_process_group("gloo", timeout=timeout)
        self.mesh: DeviceMesh = init_device_mesh(options.device, (self.ranks,))
        self.links = link_group(links=options.links)
        # Not that of the prefills, so that one which fails does not take the barrier with it.
        self.barrier = agreement_of(None).barrier
        folder = open_model(model_folder(options.model))
        self.weights, self.geometry = folder.weights(options.seed), folder.geometry
        self.model = build_model(folder, dtype=options.dtype, device=str(self.device), seed=options.seed)
        self.model.set_attn_implementation("sdpa")
        self.dtype: str = options.dtype
        self.seed: int = options.seed

    # ------------------------------------------------------------------ methods

    def methods(self, kernels: list[str], splits: dict[str, Partition]) -> list[Method]:
        """All that are compared, the given splits by name among them."""
        found = [Method(ONE_RANK, self._one_rank), Method(f"{ONE_RANK}, no cache", self._one_rank_without_cache)]
        for kernel in kernels:
            for rotation in ("alltoall", "allgather"):
                for balanced in (True, False):
                    found.append(
                        Method(
                            f"context_parallel {rotation} {'balanced' if balanced else 'in order'} {kernel}",
                            partial(self._context_parallel, balanced=balanced),
                            partial(ring_settings, rotation, balanced, KERNELS[kernel]),
                            partial(self._fits_ring, balanced=balanced),
                        )
                    )
        found.append(Method("zigzag", self._zigzag, self._our_attention, ours=True))
        found.append(Method("kvr-e", self._even, self._our_attention, ours=True))
        for name, split in splits.items():
            found.append(
                Method(
                    name,
                    partial(self._split, split=split),
                    self._our_attention,
                    partial(self._fits_split, split=split),
                    ours=True,
                )
            )
        return found

    def _one_rank(self, ids: torch.Tensor) -> Outcome:
        if self.rank:
            return Outcome(time.perf_counter())
        return told(stock_prefill(self.model, ids))

    def _one_rank_without_cache(self, ids: torch.Tensor) -> Outcome:
        if self.rank:
            return Outcome(time.perf_counter())
        return last_token(self.model(input_ids=ids, use_cache=False, logits_to_keep=1))

    def _context_parallel(self, ids: torch.Tensor, *, balanced: bool) -> Outcome:
        context = ids.shape[1]
        positions = torch.arange(context, device=ids.device)[None].repeat(ids.shape[0], 1)
        # They are resized to this rank's share in place, so they are copies, and nobody wants them back.
        own = [ids.clone(), positions]
        has_token = self.rank == (0 if balanced else self.ranks - 1)
        with context_parallel(self.mesh, buffers=own, buffer_seq_dims=[1, 1], no_restore_buffers=set(own)):
            output = self.model(
                input_ids=own[0],
                position_ids=own[1],
                # Without a mask or a cache, transformers takes positions that jump, as balanced ones do, for
                # several prompts packed into one, and masks them. A mask of ones it drops.
                attention_mask=torch.ones_like(own[0]),
                use_cache=False,
                logits_to_keep=1,
            )
            outcome = last_token(output) if has_token else Outcome(time.perf_counter())
        if has_token and int(positions[0, -1]) != context - 1:
            raise RuntimeError(f"the last of rank {self.rank}'s tokens is not the prompt's last one")
        return outcome

    def _zigzag(self, ids: torch.Tensor) -> Outcome:
        return told(zigzag(self.model, ids, group=self.links))

    def _even(self, ids: torch.Tensor) -> Outcome:
        return self._split(ids, split=Partition.even(ids.shape[1], self.ranks))

    def _split(self, ids: torch.Tensor, *, split: Partition) -> Outcome:
        return told(prefill(self.model, ids, split, group=self.links))

    @contextlib.contextmanager
    def _our_attention(self) -> Iterator[None]:
        """What ranks that time nothing else would have all along."""
        route = probe(self.model).route
        # The runs that are not timed build plans of the very shapes.
        with runahead_attention(self.model) if route == "interface" else contextlib.nullcontext(), planning():
            yield

    def _fits_ring(self, context: int, *, balanced: bool) -> str | None:
        # Torch checks neither: it shards as well as it can, and older versions then merge the wrong halves.
        parts = 2 * self.ranks if balanced else self.ranks
        return f"{context} tokens are no multiple of {parts}" if context % parts else None

    def _fits_split(self, context: int, *, split: Partition) -> str | None:
        if split.ranks != self.ranks:
            return f"the split is for {split.ranks} ranks, not {self.ranks}"
        return None if split.context == context else f"the split is for {split.context} tokens"

    # ------------------------------------------------------------------ running

    def prompt(self, context: int) -> torch.Tensor:
        """Token ids, the same on every rank."""
        words, drawn = self.geometry.vocab_size, torch.Generator().manual_seed(self.seed)
        return torch.randint(0, words, (1, context), generator=drawn).to(self.device)

    def sample(self, method: Method, ids: torch.Tensor, *, keep_logits: bool = False) -> Sample:
        """Run a method once, on the clock; all ranks learn what came of it."""
        began, outcome, failure = 0.0, None, None
        try:
            with method.around(), torch.no_grad():
                if self.cuda:
                    torch.cuda.synchronize()
                self.barrier()
                gc.disable()
                began = time.perf_counter()
                outcome = method.run(ids)
            if self.cuda:
                # What the device still has to do, or fails in, belongs to this method.
                torch.cuda.synchronize()
        except Exception as error:  # whatever it is: the other methods are timed all the same
            traceback.print_exc()
            failure = f"{type(error).__name__}: {first_line(error)}"
        finally:
            gc.enable()
        if F.scaled_dot_product_attention is not STOCK_SDPA:
            raise RuntimeError(f"{method.name} left its own SDPA behind")
        mine: tuple[Any, ...] = (failure, None, None, None)
        if outcome is not None and outcome.token is not None:
            logits = outcome.logits[0].double().cpu() if keep_logits and outcome.logits is not None else None
            mine = (failure, outcome.ended - began, outcome.token, logits)
        every: list[Any] = [None] * self.ranks
        dist.all_gather_object(every, mine)
        failure = next((f"rank {rank}: {one[0]}" for rank, one in enumerate(every) if one[0]), None)
        if failure is not None:
            if method.ours:
                renew(self.links)
            return Sample(0.0, None, None, failure)
        holder = next(one for one in every if one[2] is not None)
        return Sample(holder[1], holder[2], holder[3], None)

    def make_room(self) -> None:
        """Give memory back that the method before this one has left."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            release_link_memory(self.links)

    # --------------------------------------------------------------- verifying

    def verified(self, methods: list[Method], context: int) -> dict[str, Any]:
        """How far each method's logits are from higher precision, beside one rank's."""
        ids = self.prompt(context)
        right: list[Any] = [None, None, None]
        if self.rank == 0:
            stock = run_single(self.model, ids)
            right[0] = stock.logits[0].double().cpu()
            try:
                right[1] = run_reference(self.model, ids).logits[0].double().cpu()
            except (torch.OutOfMemoryError, NotFiniteError) as error:
                traceback.print_exc()
                right[2] = first_line(error)
            del stock
        self.make_room()
        dist.broadcast_object_list(right, src=0, device=self.device)
        stock, exact, why = right
        alone = None if exact is None else distance(stock, exact)
        token = int(stock.argmax())
        found: dict[str, Any] = {
            "context": context,
            "reference": str(reference_dtype(self.model.dtype)).removeprefix("torch."),
            "no_reference": why,
            "one_rank_from_reference": alone,
            "one_rank_token": token,
            "methods": {},
        }
        for method in methods:
            refused = method.fits(context)
            if refused is not None:
                found["methods"][method.name] = {"left_out": f"not verified: {refused}"}
                continue
            one = self.sample(method, ids, keep_logits=True)
            if one.failure is not None:
                found["methods"][method.name] = {"left_out": one.failure}
                continue
            assert one.logits is not None
            facts: dict[str, Any] = {
                "token": one.token,
                "from_one_rank": distance(one.logits, stock),
                "from_reference": None if exact is None else distance(one.logits, exact),
            }
            if exact is None or alone is None:
                close = facts["from_one_rank"] <= 16 * DTYPES[self.dtype].epsilon
            else:
                close = Deviation(self.rank, None, facts["from_reference"], alone).within(self.dtype)
            if one.token != token or not close:
                facts["left_out"] = (
                    f"does not equal one rank: token {one.token} for {token}, "
                    f"logits {facts['from_one_rank']:.1e} from one rank's"
                )
            found["methods"][method.name] = facts
        self.make_room()
        return found

    # ------------------------------------------------------------------- timing

    def timed(self, methods: list[Method], context: int, samples: int) -> dict[str, Any]:
        """TTFT of each method on one prompt, in an order that changes from round to round."""
        ids = self.prompt(context)
        left_out = {method.name: why for method in methods if (why := method.fits(context)) is not None}
        running = [method for method in methods if method.name not in left_out]
        taken: dict[str, list[float]] = {method.name: [] for method in running}
        tokens: dict[str, set[int | None]] = {method.name: set() for method in running}
        logits: dict[str, torch.Tensor] = {}
        tight = self.agreed(self._is_tight(context))
        for round_ in range(WARMUP + samples):
            # None of them always comes behind the same other one.
            for method in random.Random(round_).sample(running, len(running)):
                if method.name in left_out:
                    continue
                if tight:
                    self.make_room()
                    self.sample(method, ids)
                one = self.sample(method, ids, keep_logits=round_ == 0)
                if one.failure is not None:
                    left_out[method.name] = one.failure
                    self.make_room()
                    continue
                tokens[method.name].add(one.token)
                if one.logits is not None:
                    logits[method.name] = one.logits
                if round_ >= WARMUP:
                    taken[method.name].append(one.seconds)
        figures = {
            name: {
                "ttft_s": median(times),
                "samples_s": times,
                "tokens": sorted(tokens[name], key=str),
                "same_token": tokens[name] == tokens[ONE_RANK],
                "logits_from_one_rank": (
                    distance(logits[name], logits[ONE_RANK]) if ONE_RANK in logits and name in logits else None
                ),
            }
            for name, times in taken.items()
            if name not in left_out
        }
        self.make_room()
        return {"memory_given_back_between_methods": tight, "methods": figures, "left_out": left_out}

    def _is_tight(self, context: int) -> bool:
        """Whether the rows of two methods do not fit at once: those that peers write to torch cannot reuse."""
        if not self.cuda:
            return False
        rows = probe(self.model).entry_elements() * self.model.dtype.itemsize * context
        return 3 * rows > torch.cuda.mem_get_info(self.device)[0]

    def stock_kernel(self, context: int) -> str:
        """The SDPA kernel that torch chooses for the whole prompt."""
        shape, dtype = self.geometry, self.model.dtype
        query, key = (
            torch.empty(1, heads, context, shape.head_dim, device=self.device, dtype=dtype)
            for heads in (shape.attention_heads, shape.kv_heads)
        )
        chosen = torch._fused_sdp_choice(query, key, key, is_causal=True, enable_gqa=query.shape != key.shape)
        return SDPBackend(chosen).name.lower()

    def agreed(self, mine: bool) -> bool:
        """Whether it is so on any rank."""
        every: list[Any] = [None] * self.ranks
        dist.all_gather_object(every, mine)
        return any(every)


def last_token(output: Any) -> Outcome:
    """The first token of a pass through the model, on the host."""
    logits = output.logits[:, -1]
    token = int(logits[0].argmax())
    return Outcome(time.perf_counter(), token, logits)


def told(result: PrefillResult) -> Outcome:
    """What one of our own prefills left here."""
    ended = time.perf_counter()
    if result.first_token is None:
        return Outcome(ended)
    return Outcome(ended, int(result.first_token), result.logits)


def distance(found: torch.Tensor, right: torch.Tensor) -> float:
    """``‖found − right‖ ÷ ‖right‖``; what is not a number is as far as can be."""
    apart = float(torch.linalg.vector_norm(found - right) / torch.linalg.vector_norm(right))
    return apart if apart == apart else float("inf")


@contextlib.contextmanager
def ring_settings(rotation: str, balanced: bool, kernel: SDPBackend) -> Iterator[None]:
    """Torch's settings of context parallelism, which are global, for a while."""
    options = torch_inside._cp_options
    before = options.rotate_method, options.enable_load_balance
    torch_inside.set_rotate_method(rotation)
    # There is no public way to turn it off.
    options.enable_load_balance = balanced
    try:
        with sdpa_kernel(kernel):
            yield
    finally:
        options.rotate_method, options.enable_load_balance = before
        if F.scaled_dot_product_attention is not STOCK_SDPA:
            # Older versions put the stock one back only where nothing failed.
            torch_inside._disable_context_parallel_dispatcher_impl()


def give_cpu_a_ring(mesh: DeviceMesh) -> None:
    """Let torch's ring attention run over the CPU's kernel, which its dispatcher has no rule for."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def handler(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[DTensor, ...]:
        query, key, value, _dropout, is_causal = (*args, *(0.0, False)[len(args) - 3 :])
        parts = torch_inside._templated_ring_attention(
            mesh.get_group(),
            2,
            kernel,
            query=query.to_local(),
            key=key.to_local(),
            value=value.to_local(),
            is_causal=is_causal,
            scale=kwargs.get("scale"),
        )
        return tuple(DTensor.from_local(part, mesh, [Shard(2)], run_check=False) for part in parts)

    torch_inside.custom_ops[kernel.default] = handler


def main() -> None:
    """Verify, then time; write what there is after each context."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart-llama")
    parser.add_argument("--contexts", default="4096,16384")
    parser.add_argument("--dtype", default="float16", choices=sorted(DTYPES))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--kernels", help="of SDPA under context_parallel: " + ", ".join(KERNELS))
    parser.add_argument("--links", default="auto", choices=("auto", "peer", "nccl"), help="of KV-Runahead")
    parser.add_argument("--split", action="append", default=[], metavar="SIZES", help="9728,6656; more than once")
    parser.add_argument("--verify", type=int, default=2048, metavar="TOKENS")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        raise SystemExit("start this with torchrun --nproc-per-node RANKS -m benchmarks.context_parallel")
    try:
        splits = [Partition(tuple(int(size) for size in word.split(","))) for word in options.split]
        contexts = [int(word) for word in options.contexts.split(",")]
        # What is verified of a split is its shares.
        shares = [Partition.from_fractions(split.sizes, options.verify) for split in splits]
    except (ValueError, PartitionError) as error:
        raise SystemExit(f"--split and --contexts are numbers of tokens, like 9728,6656: {error}") from None
    kernels = (options.kernels or ("cudnn,flash" if options.device == "cuda" else "flash")).split(",")
    if unknown := sorted(set(kernels) - set(KERNELS)):
        raise SystemExit(f"no kernel {unknown[0]}; there are {', '.join(KERNELS)}")
    # One for each stream, or copies between GPUs wait for kernels that have nothing to do with them.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    world = World(options)
    if not world.cuda:
        give_cpu_a_ring(world.mesh)
    names = [f"kvr {split}" for split in splits]
    methods = world.methods(kernels, dict(zip(names, splits, strict=True)))
    verified = world.verified(world.methods(kernels, dict(zip(names, shares, strict=True))), options.verify)
    command = f"torchrun --nproc-per-node {world.ranks} -m benchmarks.context_parallel {shlex.join(sys.argv[1:])}"
    found: dict[str, Any] = {
        **conditions(command, options.device),
        "transformers": transformers.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if world.cuda else None,
        "cudnn": torch.backends.cudnn.version(),
        "ranks": world.ranks,
        "model": options.model,
        "weights": world.weights,
        "dtype": options.dtype,
        "links": options.links if world.cuda else "gloo",
        "kernel_of_one_rank": world.stock_kernel(contexts[0]),
        "ring": "torch's own" if world.cuda else "torch's own, over a CPU kernel that torch does not give it",
        "verified": verified,
        "contexts": {},
    }
    left_out = {name: why for name, facts in verified["methods"].items() if (why := facts.get("left_out"))}
    for name, facts in verified["methods"].items():
        tell(world, f"{name}: {json.dumps(facts)}")
    save(world, options.out, found)
    for context in contexts:
        equal = [method for method in methods if method.name not in left_out]
        figures = world.timed(equal, context, options.samples)
        figures["left_out"] = {**left_out, **figures["left_out"]}
        found["contexts"][str(context)] = figures
        for name, facts in figures["methods"].items():
            tell(world, f"{context} tokens, {name}: {facts['ttft_s'] * 1e3:.1f} ms, token {facts['tokens']}")
        for name, why in figures["left_out"].items():
            tell(world, f"{context} tokens, no {name}: {why}")
        save(world, options.out, found)
    world.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # Memory that other processes have mapped is not for torch to tear down in its own order.
    os._exit(0)


def tell(world: World, text: str) -> None:
    """Print it once."""
    if world.rank == 0:
        print(text, flush=True)


def save(world: World, path: Path, found: dict[str, Any]) -> None:
    """Write what is there so far."""
    if world.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
