"""What this machine can run: devices, backends, kernels and versions, and what is missing for more.

Example:
  kvr-partition doctor
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kvr_partition._version import __version__
from kvr_partition.cli.options import add_output

_EXTRAS = {
    "run": ("torch", "transformers", "numpy"),
    "search": ("optuna", "scikit-learn", "scipy", "joblib", "rich", "plotly"),
    "gpu": ("cuda-bindings",),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``doctor``."""
    add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Look around and report."""
    report = examine()
    if options.format == "json":
        from kvr_partition.cli.show import print_json

        print_json(report)
        return
    print(f"kvr-partition {report['kvr_partition']}, Python {report['python']}, {report['os']}")
    print(f"CPU      {report['cpu']}, {report['cores']} cores")
    for gpu in report["gpus"]:
        print(f"GPU      {gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, {gpu['multiprocessors']} SMs")
    for name, packages in report["packages"].items():
        parts = ", ".join(f"{package} {found or 'missing'}" for package, found in packages.items())
        print(f"[{name}]".ljust(9) + parts)
    for name, state in report["backends"].items():
        print(f"backend  {name}: {state}")
    for kernel in report["kernels"]:
        print(f"kernel   {kernel['name']} ({kernel['device']}, {kernel['dtype']}): {kernel['state']}")
    if not report["backends"]:
        print("next     pip install 'kvr-partition[all]' to measure and search on this machine")
    elif not options.quiet:
        print("next     kvr-partition search")


def examine() -> dict[str, Any]:
    """Everything that ``doctor`` tells, as data."""
    report: dict[str, Any] = {
        "kvr_partition": __version__,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {extra: {name: _version(name) for name in names} for extra, names in _EXTRAS.items()},
        "gpus": [],
        "backends": {},
        "kernels": [],
    }
    if report["packages"]["run"]["torch"] is None or report["packages"]["run"]["transformers"] is None:
        return report
    import torch
    import torch.distributed as dist

    from profiler.worker import cpu_name

    report["cpu"] = cpu_name()
    gpus = range(torch.cuda.device_count())
    report["gpus"] = [
        {
            "name": torch.cuda.get_device_name(index),
            "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            "multiprocessors": torch.cuda.get_device_properties(index).multi_processor_count,
        }
        for index in gpus
    ]
    gloo = dist.is_available() and dist.is_gloo_available()
    nccl = dist.is_available() and dist.is_nccl_available()
    report["backends"]["cpu"] = "ready (gloo)" if gloo else "this torch has no gloo"
    report["backends"]["cuda"] = (
        f"ready (NCCL), up to {len(gpus)} ranks"
        if nccl and gpus
        else "no GPU"
        if nccl
        else "this torch has no NCCL"
    )
    devices = ["cpu", *(["cuda"] if gpus else [])]
    report["kernels"] = [line for device in devices for line in _kernels(device)]
    return report


def _kernels(device: str) -> list[dict[str, str]]:
    """Try every kernel of the table that claims this device against the plain one."""
    import torch

    from kvr_partition.runtime.kernels import KERNELS

    lines = []
    plain = KERNELS[-1]
    for choice in KERNELS:
        if choice.device != device:
            continue
        for dtype in choice.dtypes:
            query, key, value = (torch.randn(1, heads, 64, 64, dtype=dtype, device=device) for heads in (4, 2, 2))
            try:
                found, lse = choice.kernel(query, key, value, scale=0.125, causal=True, bias=None)
                right, right_lse = plain.kernel(query, key, value, scale=0.125, causal=True, bias=None)
                error = max(
                    (found.float() - right.float()).abs().max().item(), (lse - right_lse).abs().max().item()
                )
                state = "works" if error < 0.02 else f"wrong by {error:.2g}"
            except Exception as failure:  # a kernel this torch lacks is what we are here to find out
                state = f"fails: {str(failure).splitlines()[0]}"
            lines.append(
                {"name": choice.name, "device": device, "dtype": str(dtype).split(".")[1], "state": state}
            )
    return lines


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
