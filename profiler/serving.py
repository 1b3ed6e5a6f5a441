"""How a process answers requests: one after another, and an error is an answer too."""

from __future__ import annotations

import dataclasses
import gc
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from kvr_partition.methods import method_of
from kvr_partition.partition import Partition
from kvr_partition.runtime.agreement import as_rank_error
from kvr_partition.runtime.channel import Doing
from kvr_partition.runtime.result import PrefillResult
from kvr_partition.runtime.verify import SingleRun, compare
from profiler import messages

Stream = Callable[[messages.Reply], None]
"""Takes replies that come before the answer."""

Answers = Mapping[type, Callable[[Any, Stream], messages.Reply]]
"""For each kind of request, what answers it."""


class Serving(Protocol):
    """What a process runs: one rank, or all ranks of one GPU."""

    def ready(self) -> messages.Reply:
        """What the driver wants to know once it has started."""

    @property
    def doing(self) -> Doing:
        """What it is at; asked by another thread."""

    def serve(self, request: messages.Request, stream: Stream) -> messages.Reply:
        """Answer one request. ``stream`` takes what comes before the answer."""


class Server:
    """Answers requests.

    Args:
        rank: as which it says that it failed.
        device: whose memory is given back after running out of it.
        answers: a function for each kind of request.
        explained: the error of a request, or what is known of it.
        on_failure: told of what `explained` says, and in which phase that was.

    Attributes:
        phase: what is under way, in words that follow "in its".
    """

    def __init__(
        self,
        rank: int,
        device: torch.device,
        answers: Answers,
        explained: Callable[[Exception, str], BaseException] = lambda error, _: error,
        on_failure: Callable[[BaseException, str], None] = lambda error, phase: None,
    ) -> None:
        self.phase = "wait for a request"
        self._rank, self._device, self._answers = rank, device, answers
        self._explained, self._on_failure = explained, on_failure

    def serve(self, request: messages.Request, stream: Stream) -> messages.Reply:
        """Answer one request."""
        self.phase = messages.PHASES.get(type(request), "request")
        try:
            answer = self._answers.get(type(request))
            if answer is None:
                raise TypeError(f"a rank has no answer to {type(request).__name__}")
            return answer(request, stream)
        except Exception as error:
            explained = self._explained(error, self.phase)
            failure = failed(explained, self._rank, self.phase)
            self._on_failure(explained, self.phase)
        finally:
            self.phase = "wait for a request"
        if failure.kind == "out-of-memory" and self._device.type == "cuda":
            # Only now that nothing refers to the error any more, nothing refers to what it was raised among.
            gc.collect()
            torch.cuda.empty_cache()
        return failure


def failed(error: BaseException, rank: int, phase: str) -> messages.Failed:
    """The answer that an error makes."""
    failed = as_rank_error(error, rank, phase)
    kind = "start" if phase == "start" and failed.kind in ("error", "lost") else failed.kind
    return messages.Failed(
        kind, str(failed), "".join(traceback.format_exception(error)), failed.phase or phase, failed.rank
    )


def chunk_done(request: messages.TimeChunk, result: PrefillResult) -> messages.ChunkDone:
    """The answer that a timed chunk makes."""
    timeline = result.timeline
    first_kv_s = timeline.first_kv_s or 0.0
    seconds = timeline.compute_s if request.layers is None else timeline.compute_s - first_kv_s
    return messages.ChunkDone(seconds, first_kv_s)


def verified(
    result: PrefillResult, partition: Partition, method: str, alone: SingleRun, reference: SingleRun
) -> messages.VerifyDone:
    """Compare one rank's result with the single run."""
    if not method_of(method).in_order:
        # The logits depend on all rows.
        result = dataclasses.replace(result, cache=None)
    deviations = compare(result, partition.ends[result.rank % partition.ranks], alone, reference)
    token = result.first_token
    same = None if token is None else bool((token.cpu() == alone.token.cpu()).all())
    return messages.VerifyDone(tuple(deviations), same)
