"""Errors a user can act on, sorted by what there is to do about each.

Every message is one line: what is wrong, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class KVRError(Exception):
    """Base of every error that this project raises on purpose."""


class PartitionError(KVRError, ValueError):
    """The numbers do not make a partition: change the sizes, the rank count or the context."""


class OutOfRangeError(KVRError, LookupError):
    """Nothing was measured there: search that context, or ask inside the range the message names."""


class FileFormatError(KVRError, ValueError):
    """A file is torn, of another schema, or holds impossible values: the message names file and field."""


class StorageError(KVRError):
    """A result cannot be written or belongs to another run: free space, or choose another folder."""


class UnsupportedError(KVRError):
    """This model, machine or installation cannot do what was asked: the message names the part at fault."""


class NotFiniteError(KVRError):
    """A prompt's logits are NaN or infinite: use another dtype, or look at the weights the message points to.

    Attributes:
        rank: whose tokens have the first keys or values that are not finite, or the last rank.
        layer: the first layer with such keys or values; None where they arise behind the last layer's.
    """

    def __init__(self, message: str, *, rank: int | None = None, layer: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.layer = layer


class RankError(KVRError):
    """A rank could not start, died, did not answer in time, failed, or disagrees with the others.

    Attributes:
        rank: the rank at fault, or None when several or none can be named.
        kind: ``"start"``, ``"lost"``, ``"timeout"``, ``"out-of-memory"``, ``"not-finite"``, ``"disagreement"``,
            ``"busy"`` (another thread is in a prefill of the same group) or ``"error"``.
        phase: what was under way: ``"start"``, ``"agreement"``, ``"layer 3 of prefill 12"``, ``"decode"``, …;
            empty when it is not known.
        traceback: what the rank itself printed last, possibly empty.
    """

    def __init__(
        self, message: str, *, rank: int | None = None, kind: str = "error", phase: str = "", traceback: str = ""
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.kind = kind
        self.phase = phase
        self.traceback = traceback
        if traceback:
            self.add_note(traceback)


def named_ranks(ranks: Sequence[int]) -> str:
    """Ranks as a sentence names them: ``rank 1``, ``ranks 0 and 2``, ``ranks 0, 1 and 2``."""
    *first, last = map(str, ranks)
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"
