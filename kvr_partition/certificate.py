"""Certificate: how far a split prefill is from one rank, layer by layer."""

from __future__ import annotations

import math
import os

import msgspec

from kvr_partition import jsonfile
from kvr_partition.dtypes import DTYPES
from kvr_partition.provenance import Provenance

SCHEMA = "kvr-partition/certificate/2"

"""Distance from one to the next larger number, by dtype."""


class Deviation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far something is from a run in higher precision: ``‖x − reference‖ ÷ ‖reference‖``.

    ``layer`` is None for the logits. ``split`` is the method's distance, ``single`` that of one rank in
    the same dtype: what a dtype costs anyway.
    """

    rank: int
    layer: int | None
    split: float
    single: float

    def within(self, dtype: str) -> bool:
        """Whether the split costs no more than rounding: twice the single run's distance, plus one epsilon.

        Distances that are not finite hold nothing.
        """
        return math.isfinite(self.single) and self.split <= 2 * self.single + DTYPES[dtype].epsilon


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The comparison of one method on one split with the single run.

    ``reference`` names the dtype of the run that both are compared with, on the same weights: float32 for
    half precision, float64 for float32.
    """

    method: str
    sizes: tuple[int, ...]
    reference: str
    same_token: bool
    """Whether the first token is the single run's; in half precision near-ties may fall either way."""
    deviations: tuple[Deviation, ...]
    provenance: Provenance
    past: int = 0
    """Tokens that every rank had in its cache before."""
    schema: str = SCHEMA

    @property
    def divergence(self) -> Deviation | None:
        """The first deviation beyond rounding: of the lowest layer, then of the lowest rank; None if all hold."""
        beyond = [deviation for deviation in self.deviations if not deviation.within(self.provenance.dtype)]
        return min(beyond, key=lambda one: (one.layer is None, one.layer or 0, one.rank), default=None)

    @property
    def holds(self) -> bool:
        """Whether the split equals the single run: within rounding, and with the same token in float32."""
        return self.divergence is None and (self.same_token or self.provenance.dtype != "float32")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the certificate as JSON, whole or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        jsonfile.write_atomic(path, jsonfile.encode(self))
