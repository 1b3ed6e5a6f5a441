"""Disjoint groups of a GPU's streaming multiprocessors (SMs), as CUDA green contexts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvr_partition.errors import UnsupportedError
from kvr_partition.runtime.driver import cuda_driver, values


@dataclass(frozen=True)
class SMGroup:
    """SMs that only the streams made here run on.

    Attributes:
        sms: how many.
    """

    sms: int
    _context: Any

    def stream(self) -> Any:
        """A new ``torch.cuda.ExternalStream`` whose kernels run on these SMs alone."""
        import torch

        driver = _driver()
        handle = _checked(
            driver.cuGreenCtxStreamCreate(self._context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0)
        )
        return torch.cuda.ExternalStream(int(handle), device=torch.cuda.current_device())


def split_sms(groups: int, device: int = 0) -> tuple[list[SMGroup], SMGroup | None]:
    """Cut a GPU into equal groups of SMs and what is left over.

    Groups are as large as the hardware's granularity allows (8 SMs on Hopper).

    Args:
        groups: how many.
        device: index of the GPU.

    Returns:
        The groups, and one of the SMs that are in none of them, or None when there are none.

    Raises:
        UnsupportedError: no cuda-bindings, a driver or GPU without green contexts, or too many groups.
    """
    import torch

    driver = _driver()
    torch.cuda.init()
    torch.zeros(1, device=f"cuda:{device}")  # makes the primary context, which green contexts belong to
    handle = _checked(driver.cuDeviceGet(device))
    whole = _checked(driver.cuDeviceGetDevResource(handle, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    total = whole.sm.smCount
    unit = max(1, getattr(whole.sm, "smCoscheduledAlignment", 0) or 8)
    least = total // groups // unit * unit
    if least < max(unit, getattr(whole.sm, "minSmPartitionSize", 0)):
        raise UnsupportedError(
            f"{total} SMs cannot be cut into {groups} groups of at least {unit}; use fewer ranks"
        )
    parts, found, rest = _values(driver.cuDevSmResourceSplitByCount(groups, whole, 0, least))
    if found < groups:
        raise UnsupportedError(f"the driver cuts {total} SMs into {found} groups, not {groups}; use fewer ranks")
    made = [_create(driver, part, handle) for part in parts[:groups]]
    return made, _create(driver, rest, handle) if rest.sm.smCount else None


def _create(driver: Any, resource: Any, device: Any) -> SMGroup:
    description = _checked(driver.cuDevResourceGenerateDesc([resource], 1))
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    return SMGroup(resource.sm.smCount, _checked(driver.cuGreenCtxCreate(description, device, flags)))


def _driver() -> Any:
    return cuda_driver("SM-partition ranks need")


def _values(result: tuple[Any, ...]) -> tuple[Any, ...]:
    return values(result, "this GPU or its driver has no SM partitions, which take CUDA 12.4 or newer")


def _checked(result: tuple[Any, ...]) -> Any:
    return _values(result)[0]
