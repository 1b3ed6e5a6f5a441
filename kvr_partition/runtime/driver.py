"""The CUDA driver's own functions, through cuda-bindings: those that torch does not offer."""

from __future__ import annotations

from typing import Any

from kvr_partition.errors import UnsupportedError

_SUCCESS = 0


def cuda_driver(what: str) -> Any:
    """The module of the driver's functions.

    Args:
        what: needs them, as an error calls it: "SM-partition ranks need".

    Raises:
        UnsupportedError: cuda-bindings is not installed, or there is no driver.
    """
    try:
        from cuda.bindings import driver

        driver.cuDriverGetVersion()  # loads the driver's library
    except ImportError:
        raise UnsupportedError(f"{what} cuda-bindings; install kvr-partition with the [gpu] extra") from None
    except Exception as error:  # cuda-pathfinder has errors of its own for a machine without a driver
        raise UnsupportedError(f"{what} an NVIDIA driver, and there is none: {error}") from None
    return driver


def values(result: tuple[Any, ...], why: str) -> tuple[Any, ...]:
    """What a function of the driver returned, without its error code.

    Args:
        why: it may have failed, for the error.

    Raises:
        UnsupportedError: it failed.
    """
    error, *found = result
    if int(error) != _SUCCESS:
        raise UnsupportedError(f"{why} ({error.name})")
    return tuple(found)
