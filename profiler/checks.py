"""What a group of ranks refuses before any of them starts or measures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvr_partition.dtypes import DTYPES
from kvr_partition.errors import PartitionError, UnsupportedError
from kvr_partition.link_kinds import BETWEEN_GPUS
from kvr_partition.methods import method_of
from kvr_partition.partition import Partition
from kvr_partition.provenance import Provenance
from profiler import messages
from profiler.measure import Candidate
from profiler.transport import in_torchrun

if TYPE_CHECKING:
    from profiler.life import Ranks

BACKENDS = ("auto", "cpu", "cuda", "sm", "simulate")
DEPTHS = ("auto", "attention", "cache")
LAYERS = ("auto", "fused", "stock")
TOPOLOGIES = ("auto", "chain", "fanout")
LINKS = ("auto", *(kind.name for kind in BETWEEN_GPUS))


def check_words(group: Ranks) -> None:
    """Refuse wrong arguments of a group.

    Raises:
        UnsupportedError: a word that is not known, or a number that is too small.
    """
    for what, known in (
        ("backend", BACKENDS),
        ("dtype", DTYPES),
        ("depth", DEPTHS),
        ("layers", LAYERS),
        ("topology", TOPOLOGIES),
        ("links", LINKS),
    ):
        if (value := getattr(group, what)) not in known:
            raise UnsupportedError(f"unknown {what} {value!r}; there are {', '.join(known)}")
    for name in ("ranks", "threads", "batch"):
        if getattr(group, name) < 1:
            raise UnsupportedError(f"{name} must be at least 1; got {getattr(group, name)}")
    check_bandwidth(group.bandwidth)


def check_candidate(group: Ranks, candidate: Candidate) -> None:
    """Refuse a candidate that a group cannot run, before any rank starts.

    Raises:
        UnsupportedError: an unknown method, or one that cannot be exact for this model.
        PartitionError: a partition that does not fit the group or the model.
    """
    from kvr_partition.runtime.positions import check_context

    method = method_of(candidate.method)
    expected = 1 if method.alone else group.ranks
    if candidate.partition.ranks != expected:
        raise PartitionError(
            f"partition {candidate.partition} has {candidate.partition.ranks} chunks; "
            f"{method.name} on this group needs {expected}"
        )
    even = Partition.even(candidate.partition.context, expected, past=candidate.partition.past)
    if method.chunks == "even" and candidate.partition != even:
        raise PartitionError(f"{method.name} runs even chunks only, which are {even}; got {candidate.partition}")
    past = candidate.partition.past
    if past and not method.takes_past:
        raise UnsupportedError(f"{method.name} is there for prompts without past tokens only")
    check_context(group.folder.config, past + candidate.partition.context)
    if method.unscheduled and group.backend == "simulate":
        raise UnsupportedError(method.unscheduled)
    if method.gathers and method.our_attention:
        from kvr_partition.runtime.gathering import check_gathering, parts_of

        check_gathering(group.shapes, method.name)  # type: ignore[arg-type]
        parts_of(method.name, candidate.partition.context, group.ranks)  # type: ignore[arg-type]
    if method.name == "tp":
        if group.bandwidth is not None or candidate.noise:
            raise UnsupportedError(
                "the collectives of tensor parallelism cannot be held to a bandwidth or disturbed"
            )
        if group.backend == "sm":
            raise UnsupportedError("tensor parallelism needs process ranks; use --backend cpu or cuda")
        if not getattr(group.folder.config, "base_model_tp_plan", None):
            raise UnsupportedError(f"transformers has no tensor-parallel plan for {group.geometry.model_type}")
        heads = (group.geometry.attention_heads, group.geometry.kv_heads)
        if any(count % group.ranks for count in heads):
            raise UnsupportedError(
                f"tensor parallelism cuts whole heads, and {heads[0]} heads with {heads[1]} KV heads cannot "
                f"be dealt to {group.ranks} ranks"
            )


def check_profile(group: Ranks, origin: Provenance) -> None:
    """Refuse a profile of other ranks than those that it is to answer for.

    Raises:
        UnsupportedError: it is of others.
    """
    for what, asked, known in (
        ("ranks", group.ranks, origin.ranks),
        ("dtype", group.dtype, origin.dtype),
        ("batch", group.batch, origin.batch),
        ("model", group.folder.geometry.name, origin.model.name),
        ("model configuration", group.folder.geometry.config_digest, origin.model.config_digest),
    ):
        if asked != known:
            raise UnsupportedError(f"this profile is of {what} {known}, not {asked}; measure one for that")


def check_memory(group: Ranks, ready: Sequence[messages.Ready], context: int, past: int) -> None:
    """Refuse a context whose even split has no room on the GPUs of a group.

    Args:
        ready: what its ranks told of themselves.

    Raises:
        UnsupportedError: it has none, with what takes how much.
    """
    from kvr_partition.runtime.positions import text_config
    from profiler.memory import Shape, check_fits

    config, geometry = text_config(group.folder.config), group.geometry
    inner = next(
        (
            width
            for name in ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
            if isinstance(width := getattr(config, name, None), int)
        ),
        4 * geometry.hidden_size,
    )
    shape = Shape(
        group.shapes.layers,
        geometry.hidden_size,
        geometry.attention_heads * geometry.head_dim,
        inner,
        DTYPES[group.dtype].nbytes,
        group.batch,
        ready[0].layers != "stock",
    )
    check_fits(
        shape,
        Partition.even(context, group.ranks, past=past),
        ready[0].weights_bytes,
        min(reply.memory_bytes for reply in ready),
        together=group.backend == "sm",
    )


def check_bandwidth(bandwidth: float | None) -> None:
    """Refuse to hold links to nothing.

    Raises:
        UnsupportedError: not more than 0.
    """
    if bandwidth is not None and not bandwidth > 0:
        raise UnsupportedError(f"bandwidth must be more than 0 bytes a second; got {bandwidth:g}")


def choose_backend(backend: str, ranks: int) -> str:
    """The backend, ``"auto"`` decided.

    Raises:
        UnsupportedError: the one that is wanted cannot run here.
    """
    if backend in ("cpu", "simulate"):
        return backend
    import torch

    gpus = torch.cuda.device_count()
    if backend == "sm":
        if in_torchrun():
            raise UnsupportedError("SM-partition ranks live in one process; do not use torchrun with them")
        if not gpus:
            raise UnsupportedError(
                "backend 'sm' cuts one NVIDIA GPU into ranks, and there is none; use --backend cpu"
            )
        return backend
    if backend == "auto":
        return "cuda" if gpus >= ranks else "cpu"
    if in_torchrun():
        gpus = gpus and int(os.environ["WORLD_SIZE"])
    if gpus < ranks:
        raise UnsupportedError(
            f"backend 'cuda' (NCCL) needs one GPU a rank: {ranks} ranks, {gpus} GPUs here; "
            "use --backend cpu or fewer ranks"
        )
    return backend
