"""The number formats of weights and KV that a prefill may have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dtype:
    """A number format.

    Attributes:
        nbytes: of one number.
        epsilon: the distance from 1 to the next number.
        reference: the more precise format of the results that its own are checked against.
    """

    nbytes: int
    epsilon: float
    reference: str


DTYPES: dict[str, Dtype] = {
    "float32": Dtype(4, 2.0**-23, "float64"),
    "float16": Dtype(2, 2.0**-10, "float32"),
    "bfloat16": Dtype(2, 2.0**-7, "float32"),
}
"""By the names that torch has for them."""
