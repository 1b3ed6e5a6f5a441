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
from kvr_partition.errors import KVRError
from kvr_partition.link_kinds import KINDS

_EXTRAS = {
    "run": ("torch", "transformers", "numpy"),
    "search": ("optuna", "scikit-learn", "scipy", "joblib", "rich", "plotly"),
    "gpu": ("cuda-bindings", "liger-kernel"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``doctor``."""
    parser.add_argument(
        "--links",
        action=argparse.BooleanOptionalAction,
        help="try every link between ranks (default: where there are two GPUs or more)",
    )
    add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Look around and report."""
    report = examine(links=options.links)
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
    for line in report["layers"]:
        print(f"layers   {line['device']}: {line['state']}")
    for line in link_lines(report["links"]) if report["links"] else ():
        print(line)
    if not report["backends"]:
        print("next     pip install 'kvr-partition[all]' to measure and search on this machine")
    elif not options.quiet:
        print("next     kvr-partition search")


def examine(links: bool | None = None) -> dict[str, Any]:
    """Everything that ``doctor`` tells, as data.

    Args:
        links: whether to try links between ranks; None: where there are two GPUs or more.
    """
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
        "layers": [],
        "links": None,
    }
    if report["packages"]["run"]["torch"] is None or report["packages"]["run"]["transformers"] is None:
        return report
    import torch
    import torch.distributed as dist

    from profiler.rank import cpu_name

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
        f"ready ({'peer memory or ' if report['packages']['gpu']['cuda-bindings'] else ''}NCCL), "
        f"up to {len(gpus)} ranks"
        if nccl and gpus
        else "no GPU"
        if nccl
        else "this torch has no NCCL"
    )
    devices = ["cpu", *(["cuda"] if gpus else [])]
    report["kernels"] = [line for device in devices for line in _kernels(device)]
    report["layers"] = [{"device": device, "state": _layers(device)} for device in devices]
    if links or (links is None and len(gpus) > 1):
        report["links"] = _links(len(gpus))
    return report


def _links(gpus: int) -> dict[str, Any]:
    from profiler.linktest import try_links

    try:
        return try_links(gpus)
    except KVRError as error:
        return {"pairs": [], "held": [], "failed": str(error)}


def link_lines(links: dict[str, Any]) -> list[str]:
    """What was found out about links, in words."""
    titles = {kind.name: kind.title.split(":")[0] for kind in KINDS}
    lines = [
        f"link     {pair['from']}→{pair['to']}: {titles[pair['kind']]}, {pair['latency_s'] * 1e6:.0f} µs, "
        f"{pair['bandwidth'] / 1e9:.3g} GB/s alone, {pair['bandwidth_together'] / 1e9:.3g} with all others"
        for pair in links["pairs"]
    ]
    for link in links["held"]:
        how = "moves" if link["moves"] else "does NOT move"
        lines.append(f"link     {link['link']} {how} while {link['while']} is held")
    if "failed" in links:
        lines.append(f"link     could not be tried: {links['failed']}")
    return lines


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


def _layers(device: str) -> str:
    """Which parts of a small Llama can be replaced on a device, and why others cannot."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from kvr_partition.runtime.fused import fused_model

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    dtype = torch.float16 if device == "cuda" else torch.float32
    found = fused_model(AutoModelForCausalLM.from_config(config).eval().to(device, dtype))
    left = f"; {found.left[0]}" if found.left else ""
    default = "" if device == "cuda" else ", with --layers fused only"
    return f"{found.name} of a Llama{default}{left}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
