"""Matrix products whose kernels are chosen for a group of SMs, by timing them there.

cuBLAS chooses a kernel for the whole GPU. On an eighth of its SMs the same kernel may come to three quarters of
what another one reaches, and which one it is changes with every 128 rows: uneven chunks would be measured as slow
for a reason that ranks of whole GPUs do not have. Telling cuBLAS how many SMs there are makes its choice no
better, and the fastest on a group alone is not the fastest when all groups share the memory and the power
(docs/sm-partitions.md has the figures). So a few of its candidates are timed on all groups at once.
"""

from __future__ import annotations

import ctypes
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvr_partition.errors import UnsupportedError

LEAST_ROWS = 512
"""With fewer rows a product is over before its kernel matters."""

WORKSPACE = 32 << 20
"""Bytes that kernels may use to put partial sums; as much as torch gives cuBLAS on Hopper."""

_HEURISTICS, _FEWER = 6, 2
"""Candidates that cuBLAS is asked for, each for all SMs and for those of the group; fewer once some are known."""

_KEPT = 4
"""The best of other row counts with the same weight are candidates too."""

_ROUNDS = 2
_HOPELESS = 1.15
"""Who took so many times as long as the fastest in the first round is not timed again."""

_TYPES = {torch.float16: 2, torch.bfloat16: 14}
_COMPUTE_FLOAT32, _FLOAT32 = 68, 0
_TRANSPOSE_A, _SM_COUNT_TARGET = 3, 15
_MAX_WORKSPACE_BYTES = 1


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint64 * 8),)


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True)
class Choice:
    """A kernel of cuBLAS, with its settings.

    Attributes:
        algorithm: as cuBLAS describes it.
        sms: what it is told of the SMs at hand; 0 for all of them.
    """

    algorithm: bytes
    sms: int


@dataclass(frozen=True)
class _Shape:
    rows: int
    columns: int
    inner: int
    row_stride: int
    weight_stride: int
    output_stride: int
    adds: bool
    """Whether the product is added to what its output holds."""
    dtype: torch.dtype


@dataclass
class GroupProducts:
    """Chooses and runs the matrix products of groups of equally many SMs.

    Attributes:
        sms: how many a group has.
        streams: one of each group.
        chosen: what was chosen for each shape, None where cuBLAS's own choice was the fastest.
    """

    sms: int
    streams: Sequence[torch.cuda.Stream]
    chosen: dict[_Shape, Choice | None] = field(default_factory=dict)
    _best: dict[tuple[int, int, torch.dtype], list[Choice]] = field(default_factory=dict)
    _workspaces: dict[int, torch.Tensor] = field(default_factory=dict)

    def product(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        choosing: bool,
        to: torch.Tensor | None = None,
        adds: bool = False,
    ) -> torch.Tensor | None:
        """``left @ right`` on the current stream; None where there is nothing better than torch's own.

        Args:
            left: ``[rows, inner]``.
            right: ``[inner, columns]``, a transposed weight.
            to: where it is put; somewhere new when None.
            adds: whether it is added to what is there.
            choosing: whether kernels may be timed for a shape that was not met before, which a stream that
                records cannot do.
        """
        shape = _shape(left, right, to, adds)
        if shape is None:
            return None
        if shape not in self.chosen:
            if not choosing:
                return None
            try:
                self.chosen[shape] = self._choose(shape, left, right)
            except torch.OutOfMemoryError:
                # Copies for all groups are what does not fit; the product itself may.
                self.chosen[shape] = None
        choice = self.chosen[shape]
        if choice is None:
            return None
        output = left.new_empty((shape.rows, shape.columns)) if to is None else to
        if _call(shape, choice.sms).run(choice, left, right, output, self._workspace()):
            raise UnsupportedError("cuBLAS refuses a product that it ran before")
        return output

    def _choose(self, shape: _Shape, left: torch.Tensor, right: torch.Tensor) -> Choice | None:
        """The fastest of cuBLAS's candidates when all groups run it at once; None for torch's own."""
        known = self._best.setdefault((shape.columns, shape.inner, shape.dtype), [])
        candidates = dict.fromkeys(known)
        for sms in (0, self.sms):
            candidates |= dict.fromkeys(_call(shape, sms).candidates(_FEWER if known else _HEURISTICS))
        # Rows and weights of its own for every group: ranks whose chunks differ are at different layers soon, and
        # then nobody finds in the cache what another one has read.
        operands = [(left, right), *((left.clone(), right.t().clone().t()) for _ in self.streams[1:])]
        outputs = [left.new_zeros((shape.rows, shape.output_stride))[:, : shape.columns] for _ in self.streams]
        torch.cuda.synchronize()

        def took(choice: Choice | None, products: int) -> float:
            began = time.perf_counter()
            for _ in range(products):
                for stream, (rows, weight), output in zip(self.streams, operands, outputs, strict=True):
                    with torch.cuda.stream(stream):
                        if choice is None and shape.adds:
                            output.addmm_(rows, weight)
                        elif choice is None:
                            torch.mm(rows, weight, out=output)
                        elif _call(shape, choice.sms).run(choice, rows, weight, output, self._workspace()):
                            return math.inf
            torch.cuda.synchronize()
            return (time.perf_counter() - began) / products

        for choice in (None, *candidates):
            took(choice, 1)  # kernels load
        first = {choice: took(choice, 2) for choice in (None, *candidates)}
        hopeful = {choice: [time] for choice, time in first.items() if time <= _HOPELESS * min(first.values())}
        for _ in range(_ROUNDS):
            for choice, times in hopeful.items():
                times.append(took(choice, 4))
        # Whatever disturbs so short a run only makes it longer.
        ranking = sorted(hopeful, key=lambda choice: min(hopeful[choice]))
        best = [*(one for one in ranking if one is not None), *known]
        self._best[shape.columns, shape.inner, shape.dtype] = list(dict.fromkeys(best))[:_KEPT]
        return ranking[0]

    def _workspace(self) -> torch.Tensor:
        """One for each stream: ranks run at once."""
        stream = torch.cuda.current_stream().cuda_stream
        if stream not in self._workspaces:
            self._workspaces[stream] = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
        return self._workspaces[stream]


class chosen_products(TorchDispatchMode):  # noqa: N801 - reads as a statement: with chosen_products(...):
    """While it lasts, matrix products of this thread run the kernels that ``products`` chooses."""

    def __init__(self, products: GroupProducts, choosing: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._products = products
        self._choosing = choosing

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = None
        if func is torch.ops.aten.mm.default or func is torch.ops.aten.mm.out:
            left, right = args
            output = self._products.product(left, right, self._choosing, (kwargs or {}).get("out"))
        elif func is torch.ops.aten.addmm_.default and not kwargs:
            to, left, right = args
            output = self._products.product(left, right, self._choosing, to, adds=True)
        if output is not None:
            return output
        return func(*args, **(kwargs or {}))


def _shape(left: torch.Tensor, right: torch.Tensor, to: torch.Tensor | None, adds: bool) -> _Shape | None:
    """What decides on a kernel; None for products that are left to torch."""
    if (
        not left.is_cuda
        or left.dtype not in _TYPES
        or left.shape[0] < LEAST_ROWS
        or left.stride(1) != 1
        or right.stride(0) != 1
        or right.shape[1] < 2
        or (to is not None and to.stride(1) != 1)
    ):
        return None
    columns = right.shape[1]
    stride = columns if to is None else to.stride(0)
    return _Shape(left.shape[0], columns, left.shape[1], left.stride(0), right.stride(1), stride, adds, left.dtype)


class _Call:
    """A product as cuBLAS sees it: column-major, so it is the transposed weight times the transposed rows."""

    def __init__(self, shape: _Shape, sms: int) -> None:
        self._library, self._handle = _library()
        self._sms = sms
        kind = _TYPES[shape.dtype]
        self._description = ctypes.c_void_p()
        self._check(
            self._library.cublasLtMatmulDescCreate(
                ctypes.byref(self._description), ctypes.c_int(_COMPUTE_FLOAT32), ctypes.c_int(_FLOAT32)
            )
        )
        self._set(_TRANSPOSE_A, 1)
        if sms:
            self._set(_SM_COUNT_TARGET, sms)
        self._weight = self._layout(kind, shape.inner, shape.columns, shape.weight_stride)
        self._rows = self._layout(kind, shape.inner, shape.rows, shape.row_stride)
        self._output = self._layout(kind, shape.columns, shape.rows, shape.output_stride)
        self._adds = shape.adds

    def candidates(self, most: int) -> list[Choice]:
        """What cuBLAS would try, the likeliest first."""
        preference = ctypes.c_void_p()
        self._check(self._library.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)))
        workspace = ctypes.c_uint64(WORKSPACE)
        self._check(
            self._library.cublasLtMatmulPreferenceSetAttribute(
                preference, ctypes.c_int(_MAX_WORKSPACE_BYTES), ctypes.byref(workspace), ctypes.c_size_t(8)
            )
        )
        found, count = (_Heuristic * most)(), ctypes.c_int()
        answer = self._library.cublasLtMatmulAlgoGetHeuristic(
            self._handle, self._description, self._weight, self._rows, self._output, self._output,
            preference, ctypes.c_int(most), found, ctypes.byref(count),
        )  # fmt: skip
        self._library.cublasLtMatmulPreferenceDestroy(preference)
        if answer:
            return []
        return [
            Choice(bytes(candidate.algorithm), self._sms)
            for candidate in found[: count.value]
            if candidate.state == 0
        ]

    def run(
        self,
        choice: Choice,
        left: torch.Tensor,
        right: torch.Tensor,
        output: torch.Tensor,
        workspace: torch.Tensor,
    ) -> int:
        """Enqueue the product on the current stream; what cuBLAS answers, 0 if it does."""
        one, kept = ctypes.c_float(1.0), ctypes.c_float(float(self._adds))
        algorithm = _Algorithm.from_buffer_copy(choice.algorithm)
        result = ctypes.c_void_p(output.data_ptr())
        return int(
            self._library.cublasLtMatmul(
                self._handle, self._description,
                ctypes.byref(one), ctypes.c_void_p(right.data_ptr()), self._weight,
                ctypes.c_void_p(left.data_ptr()), self._rows,
                ctypes.byref(kept), result, self._output, result, self._output,
                ctypes.byref(algorithm),
                ctypes.c_void_p(workspace.data_ptr()), ctypes.c_size_t(workspace.numel()),
                ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            )
        )  # fmt: skip

    def _layout(self, kind: int, rows: int, columns: int, stride: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        self._check(
            self._library.cublasLtMatrixLayoutCreate(
                ctypes.byref(layout),
                ctypes.c_int(kind),
                ctypes.c_uint64(rows),
                ctypes.c_uint64(columns),
                ctypes.c_int64(stride),
            )
        )
        return layout

    def _set(self, attribute: int, value: int) -> None:
        number = ctypes.c_int32(value)
        self._check(
            self._library.cublasLtMatmulDescSetAttribute(
                self._description, ctypes.c_int(attribute), ctypes.byref(number), ctypes.c_size_t(4)
            )
        )

    def _check(self, answer: int) -> None:
        if answer:
            raise UnsupportedError(f"cuBLAS cannot describe a matrix product: status {answer}")


@functools.cache
def _call(shape: _Shape, sms: int) -> _Call:
    return _Call(shape, sms)


@functools.cache
def _library() -> tuple[Any, Any]:
    """The cuBLASLt that torch has loaded, and a handle of our own."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    path = next((line.split()[-1] for line in maps if "/libcublasLt.so" in line), None)
    if path is None:
        raise UnsupportedError("torch has no cuBLASLt loaded")
    library, handle = ctypes.CDLL(path), ctypes.c_void_p()
    if answer := library.cublasLtCreate(ctypes.byref(handle)):
        raise UnsupportedError(f"cuBLASLt does not start: status {answer}")
    return library, handle
