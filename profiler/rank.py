"""What a rank computes with: a model that is built once, and what prompts and caches are made of."""

from __future__ import annotations

import contextlib
import gc
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import GenerationConfig

from kvr_partition.methods import Method
from kvr_partition.runtime import probe, stock, warm_up
from kvr_partition.runtime.cache import RunaheadCache
from kvr_partition.runtime.chunk import chunk_cache, run_chunk
from kvr_partition.runtime.execution import EAGER, Execution
from kvr_partition.runtime.fused import Layers, chosen_layers
from kvr_partition.runtime.fused.recorded import LONGEST
from kvr_partition.runtime.links.plan import LinkLimits, NoLinks
from kvr_partition.runtime.replacing import runahead_attention
from kvr_partition.runtime.result import PrefillResult
from kvr_partition.runtime.support import Depth
from profiler import messages
from profiler.layers import run_layers
from profiler.models import build_model, build_tensor_parallel, open_model


class Rank:
    """A model on a device, and how it is run there.

    Args:
        setup: what the driver wants.
        device: of the model.
        group: whose links KV-Runahead uses; None for the world's own.
        execution: who allocates rows of KV.
        barrier: all ranks meet in it.

    Attributes:
        model: with the generation settings of none, so that the model itself is timed.
        settings: those of its checkpoint, which hold where tokens are decoded.
        depth, layers: how far the runtime reaches into it, and whose parts run.
        chosen: the layers that run.
    """

    def __init__(
        self,
        setup: messages.Setup,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        execution: Execution = EAGER,
        barrier: Callable[[], None] = lambda: None,
    ) -> None:
        self.setup, self.device, self.group, self.execution = setup, device, group, execution
        self._barrier = barrier
        folder = open_model(setup.model)
        self.model = build_model(folder, dtype=setup.dtype, device=setup.device, seed=setup.seed)
        self.settings, self.model.generation_config = self.model.generation_config, GenerationConfig()
        self._has_weights = folder.has_weights
        self._vocab = folder.geometry.vocab_size
        self._tensor_parallel: Any = None
        self._past: tuple[torch.Tensor | None, Any] = (None, None)
        self.depth: Depth = probe(self.model).choose(setup.depth)  # type: ignore[arg-type]
        self.layers: Layers = setup.layers  # type: ignore[assignment]
        self.chosen = chosen_layers(self.model, self.layers)
        # The model lives as long as this process; collecting garbage never needs to look at it again.
        gc.collect()
        gc.freeze()

    @property
    def is_last(self) -> bool:
        """Whether it has the prompt's last token; ranks that share a process are all in it."""
        return self.setup.backend == "sm" or self.setup.rank == self.setup.ranks - 1

    def ready(self, link: str = "none", topology: str = "chain") -> messages.Ready:
        """What the driver wants to know of a rank that has started.

        Args:
            link: the kind of its links, as provenance names it.
            topology: how KV travels with method ``"kvr"``.
        """
        on_cuda = self.device.type == "cuda"
        return messages.Ready(
            device_name=torch.cuda.get_device_name(self.device) if on_cuda else cpu_name(),
            host=platform.node(),
            depth=self.depth,
            torch=str(torch.__version__),
            transformers=transformers.__version__,
            cuda=torch.version.cuda if on_cuda else None,
            nccl=".".join(map(str, torch.cuda.nccl.version())) if on_cuda else None,
            driver=driver_version() if on_cuda else None,
            link=link,
            topology=topology,
            layers=self.chosen.name,
            left=tuple(self.chosen.left_in_short),
            weights_bytes=sum(parameter.nbytes for parameter in self.model.parameters()) if on_cuda else 0,
            memory_bytes=torch.cuda.get_device_properties(self.device).total_memory if on_cuda else 0,
        )

    # ------------------------------------------------------------------------------------------- what it reads

    def tokens(self, count: int, seed: int) -> torch.Tensor:
        """Seeded random tokens, ``[batch, count]``."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self._vocab, (self.setup.batch, count), generator=generator)
        return ids.to(self.device)

    def past_cache(self, before: torch.Tensor) -> Any:
        """The KV of the tokens before a prompt, from one rank; kept until other tokens are asked for."""
        known, cache = self._past
        if known is None or not torch.equal(known, before):
            cache = stock(self.model, before).cache
            self._past = (before, cache)
        return cache

    def past_rows(self, before: torch.Tensor, ids: torch.Tensor, end: int) -> RunaheadCache | None:
        """The same as rows with room for everything up to position ``end``: nothing is copied on the clock."""
        past = before.shape[1]
        if not past:
            return None
        return chunk_cache(
            self.model,
            ids[:, :0],
            prefix=past,
            reserve=end - past,
            past=self.past_cache(before),
            execution=self.execution,
        )

    # ----------------------------------------------------------------------------------------- how it is run

    def attention(self, method: Method) -> contextlib.AbstractContextManager[None]:
        """The attention of a method, set up before the clock starts: that walks over all modules."""
        if method.our_attention and self.depth == "attention" and probe(self.model).route == "interface":
            return runahead_attention(self.model)
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def record_short(self, tokens: int) -> None:
        """Have launches of short chunks recorded, as serving code has after `warm_up`; no part of a prefill."""
        if self.device.type == "cuda" and tokens <= LONGEST:
            chosen_layers(self.model, self.layers).record(tokens, least=tokens)

    def warm_up(self, tokens: int) -> int:
        """Make ready for chunks of up to so many tokens; how many plans that took."""
        return warm_up(self.model, tokens, self.depth, self.layers).plans

    def chunk(self, ids: torch.Tensor, prefix: int, layers: int | None = None) -> PrefillResult:
        """A chunk by itself behind a prefix of random KV, without links.

        Args:
            layers: how many layers to run, see `run_layers`; None for a whole prefill.
        """
        cache = random_prefix(chunk_cache(self.model, ids, prefix=prefix))
        if layers is not None:
            return run_layers(self.model, ids, cache, layers, depth=self.depth, model_layers=self.layers)
        return run_chunk(
            self.model, ids, cache, rank=0, ranks=1, links=NoLinks(), depth=self.depth, layers=self.layers
        )

    def limits(self, request: messages.Prefill | messages.Verify) -> LinkLimits:
        """What links are held to."""
        return LinkLimits(request.bandwidth, request.noise, self.setup.noise_seed)

    def tensor_parallel(self) -> Any:
        """The same model, its layers cut across all ranks by transformers; built at the first call."""
        if self._tensor_parallel is None:
            setup = self.setup
            folder = Path(setup.model)
            if not self._has_weights:
                folder = Path(setup.scratch) / "checkpoint"
                if setup.rank == 0:
                    self.model.save_pretrained(folder)
                self._barrier()
            self._tensor_parallel = build_tensor_parallel(
                folder, dtype=setup.dtype, rank=setup.rank, ranks=setup.ranks
            )
            self._barrier()
        return self._tensor_parallel


def random_prefix(cache: RunaheadCache) -> RunaheadCache:
    """Fill in a prefix that no link brings: zeros would be faster to multiply than real data."""
    for _, layer in cache.kv_layers:
        layer.store.rows[: layer.kept_prefix].normal_()
    return cache


def cpu_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def driver_version() -> str | None:
    """The NVIDIA driver's version, where the system tells it."""
    with contextlib.suppress(OSError), Path("/proc/driver/nvidia/version").open(encoding="utf-8") as lines:
        words = lines.readline().split()
        return next((word for word in words if word[0].isdigit() and "." in word), None)
    return None


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a sample would be measured as prefill."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
