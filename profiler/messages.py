"""What the driver asks of ranks and what they answer."""

from __future__ import annotations

from typing import Any

import msgspec

from kvr_partition.certificate import Deviation
from kvr_partition.measurement import RankTimes
from kvr_partition.partition import Partition


class Setup(msgspec.Struct, frozen=True, tag=True):
    """How a rank builds its model and meets the others."""

    model: str
    rank: int
    ranks: int
    device: str
    dtype: str
    depth: str
    layers: str
    seed: int
    batch: int
    threads: int
    rendezvous: str
    timeout_s: float
    backend: str = "cpu"
    topology: str = "chain"
    links: str = "auto"
    noise_seed: int = 0
    scratch: str = ""
    """A folder that all ranks of this machine share."""


class Prefill(msgspec.Struct, frozen=True, tag=True):
    """One timed prefill of seeded random tokens by ``method`` with these chunk sizes."""

    method: str
    sizes: tuple[int, ...]
    token_seed: int
    noise: int = 0
    bandwidth: float | None = None
    cold: bool = False
    """As a shape that was never seen: nothing is planned for it before the clock starts."""
    past: int = 0
    """Tokens that every rank has in its cache before the clock starts."""

    @property
    def partition(self) -> Partition:
        """The chunks."""
        return Partition(self.sizes, self.past)


class Verify(msgspec.Struct, frozen=True, tag=True):
    """One prefill like a timed one, compared with the single run; see `certificate`."""

    method: str
    sizes: tuple[int, ...]
    token_seed: int
    noise: int = 0
    bandwidth: float | None = None
    past: int = 0

    @property
    def partition(self) -> Partition:
        """The chunks."""
        return Partition(self.sizes, self.past)


class PlanAhead(msgspec.Struct, frozen=True, tag=True):
    """Have kernels plan for whatever shapes may come, up to so many tokens."""

    tokens: int


class TimeChunk(msgspec.Struct, frozen=True, tag=True):
    """Every rank at once times ``chunk`` tokens behind ``prefix`` tokens, without links.

    Or ``alone`` the first rank, while all others are idle. Or no more than ``layers`` layers, from when the KV of
    the first one is ready to when that of the last one's successor is.
    """

    chunk: int
    prefix: int
    cold: bool = False
    alone: bool = False
    layers: int | None = None


class TimeLink(msgspec.Struct, frozen=True, tag=True):
    """Each rank in turn sends ``repeats`` messages of so many bytes to the next one."""

    nbytes: int
    repeats: int
    bandwidth: float | None = None


class Generate(msgspec.Struct, frozen=True, tag=True):
    """A KV-Runahead prefill of these tokens, then greedy decoding on the last rank."""

    input_ids: tuple[int, ...]
    sizes: tuple[int, ...]
    max_new_tokens: int


class Close(msgspec.Struct, frozen=True, tag=True):
    """No more requests."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is built and the group has met."""

    device_name: str
    host: str
    depth: str
    torch: str
    transformers: str
    cuda: str | None
    nccl: str | None
    driver: str | None
    link: str = "none"
    topology: str = "chain"
    """What the group's links are, and how KV travels with method ``"kvr"``."""
    layers: str = "stock"
    """As provenance names them."""
    left: tuple[str, ...] = ()
    """What of them stays the model's own although others are replaced, and why."""
    weights_bytes: int = 0
    memory_bytes: int = 0
    """Of the model, and of the GPU; 0 on other devices."""


class PrefillDone(msgspec.Struct, frozen=True, tag=True):
    """One rank's part of a timed prefill. Stamps are its monotonic clock, in seconds."""

    began: float
    ended: float
    times: RankTimes
    kv_bytes: int
    first_token: int | None
    host_s: float = 0.0
    """Seconds the host spent enqueueing, where that is known."""


class VerifyDone(msgspec.Struct, frozen=True, tag=True):
    """What one rank found; ``same_token`` is None on ranks without a first token."""

    deviations: tuple[Deviation, ...]
    same_token: bool | None


class PlanDone(msgspec.Struct, frozen=True, tag=True):
    """How many plans were built, in how many seconds."""

    built: int
    seconds: float


class ChunkDone(msgspec.Struct, frozen=True, tag=True):
    """Seconds for the chunk, or for some layers, and until the KV of its first layer was ready."""

    seconds: float
    first_kv_s: float


class Idle(msgspec.Struct, frozen=True, tag=True):
    """Another rank was asked, and this one kept still."""


class LinkDone(msgspec.Struct, frozen=True, tag=True):
    """Seconds of each message from this rank to the next; none on the last rank."""

    seconds: tuple[float, ...]


class Token(msgspec.Struct, frozen=True, tag=True):
    """One decoded token, ``at_s`` seconds after the prefill began."""

    token: int
    at_s: float


class GenerateDone(msgspec.Struct, frozen=True, tag=True):
    """Decoding has ended."""


class Many(msgspec.Struct, frozen=True, tag=True):
    """The replies of all ranks that live in one process."""

    replies: tuple[Ready | PrefillDone | VerifyDone | PlanDone | ChunkDone | LinkDone | GenerateDone, ...]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The request failed on this rank; see `RankError` for what the fields say."""

    kind: str
    message: str
    traceback: str = ""
    phase: str = ""
    culprit: int | None = None
    """The rank at fault, where this one knows; a victim names another one."""


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Whether the process still runs, and what it is at; answered while it is busy."""

    number: int


class Pong(msgspec.Struct, frozen=True, tag=True):
    """What the process of a rank is at, in words that follow "it is", and the rank that it waits for, if any."""

    number: int
    doing: str
    waits_for: int | None


class Renew(msgspec.Struct, frozen=True, tag=True):
    """Agree anew after a failure, if all ranks are still there."""


class Renewed(msgspec.Struct, frozen=True, tag=True):
    """The group has links again on which nothing of the failed request can arrive."""


Request = Setup | Prefill | Verify | PlanAhead | TimeChunk | TimeLink | Generate | Ping | Renew | Close
Reply = (
    Ready
    | PrefillDone
    | VerifyDone
    | PlanDone
    | ChunkDone
    | Idle
    | LinkDone
    | Token
    | GenerateDone
    | Many
    | Pong
    | Renewed
    | Failed
)

PHASES: dict[type, str] = {
    Prefill: "prefill",
    Verify: "verification",
    PlanAhead: "warm-up",
    TimeChunk: "timing of a chunk",
    TimeLink: "timing of links",
    Generate: "prefill",
    Renew: "renewal",
}
"""What is under way while ranks serve a request."""

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Any) -> bytes:
    """A message as bytes, without its length."""
    return _encoder.encode(message)


def decode_request(body: bytes) -> Request:
    """A request from the body of a message."""
    return _requests.decode(body)


def decode_reply(body: bytes) -> Reply:
    """A reply from the body of a message."""
    return _replies.decode(body)
