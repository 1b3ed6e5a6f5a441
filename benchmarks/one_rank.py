"""One rank against stock transformers, and where its time goes.

For each model and context, in one interleaved run: transformers as it is, this runtime with the model's own
layers, and with fused ones. ``floor`` is the device time of a prefill's matrix products and attention by
themselves, one after the other. The breakdown comes from a profiled run of its own: seconds of kernels by kind,
and what no kernel fills.

    python -m benchmarks.one_rank --models llama-7b,llama-3.1-8b --contexts 512,1024,4096,16384 --out data/h100-sxm
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from kvr_partition.cli.options import model_folder
from kvr_partition.measurement import median
from kvr_partition.partition import Partition
from kvr_partition.runtime import prefill, warm_up
from kvr_partition.runtime.fused import chosen_layers
from kvr_partition.runtime.kernels import attend, planning
from kvr_partition.runtime.support import first_token, forward, probe
from profiler.models import build_model, open_model

KINDS = ("products", "attention", "copies", "elementwise")


def kind_of(kernel: str) -> str:
    """Which kind of work a kernel is, by its name."""
    name = kernel.lower()
    if any(word in name for word in ("gemm", "nvjet", "cutlass", "xmma", "splitk", "gemv")):
        return "products"
    if any(word in name for word in ("flash", "fmha", "sdpa", "cudnn", "attention")):
        return "attention"
    if "memcpy" in name or "memset" in name or "copy" in name:
        return "copies"
    return "elementwise"


@torch.no_grad()
def stock(model: Any, ids: torch.Tensor) -> None:
    """Transformers as it is: its cache, its attention, its layers."""
    cache = transformers.DynamicCache(config=model.config)
    first_token(forward(model, ids, cache))


def ways(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What is compared."""
    whole = Partition((ids.shape[1],))
    return {
        "stock": lambda: stock(model, ids),
        "ours, stock layers": lambda: prefill(model, ids, whole, layers="stock"),
        "ours, fused layers": lambda: prefill(model, ids, whole, layers="fused"),
    }


def seconds(work: Callable[[], Any]) -> float:
    """Until the host has the token that ``work`` ends with."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def interleaved(found: dict[str, Callable[[], Any]], samples: int) -> dict[str, Any]:
    """Samples of each, in turns back and forth."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for work in found.values():
        for _ in range(2):
            seconds(work)
    for turn in range(samples):
        for name in list(found)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(seconds(found[name]))
    return {name: {"median_s": median(one), "samples_s": one} for name, one in times.items()}


def breakdown(work: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of kernels by kind in one profiled run, and of no kernel at all."""
    from torch.profiler import ProfilerActivity, profile

    seconds(work)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        took = seconds(work)
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    kinds = dict.fromkeys(KINDS, 0.0)
    kernels: dict[str, list[float]] = {}
    for start, end, name in spans:
        kinds[kind_of(name)] += (end - start) / 1e6
        kernels.setdefault(name[:90], []).append((end - start) / 1e6)
    busy = sum(kinds.values())
    longest = sorted(kernels.items(), key=lambda one: -sum(one[1]))[:14]
    return {
        **{f"{kind}_s": value for kind, value in kinds.items()},
        "idle_s": took - busy,
        "ttft_s": took,
        "products_and_attention": (kinds["products"] + kinds["attention"]) / took,
        "longest": [{"kernel": name, "seconds": sum(one), "calls": len(one)} for name, one in longest],
    }


def floor(model: Any, tokens: int, samples: int) -> dict[str, float]:
    """Device seconds of all matrix products of a prefill and of its attention, each by itself."""
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    linears = [
        module.weight for layer in layers for module in layer.modules() if isinstance(module, torch.nn.Linear)
    ]
    kv = next(layer for layer in probe(model).layers if layer is not None)
    config = model.config
    heads = config.num_attention_heads
    query = torch.randn((1, tokens, heads, kv.key_dim), device="cuda", dtype=model.dtype).transpose(1, 2)
    key, value = (
        torch.randn((1, tokens, kv.key_heads, kv.key_dim), device="cuda", dtype=model.dtype).transpose(1, 2)
        for _ in range(2)
    )
    inputs = {width: torch.randn((tokens, width), device="cuda", dtype=model.dtype) for width in
              {weight.shape[1] for weight in linears}}  # fmt: skip

    def products() -> None:
        for weight in linears:
            torch.mm(inputs[weight.shape[1]], weight.t())

    def attention() -> None:
        for _ in range(len(probe(model).layers)):
            attend(query, key, value, scale=kv.key_dim**-0.5, causal=True)

    found = {}
    for name, work in (("products_s", products), ("attention_s", attention)):
        times = []
        for turn in range(samples + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The host is ahead of the device, so that what is timed is the device.
            torch.cuda._sleep(20_000_000)
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            if turn >= 2:
                times.append(begin.elapsed_time(end) / 1e3)
        found[name] = median(times)
    return found


def cold(model: Any, tokens: int, count: int) -> dict[str, Any]:
    """Lengths never seen before, alone and behind a prefix, against the same again with plans of their own."""
    from kvr_partition.runtime.chunk import chunk_cache, run_chunk
    from kvr_partition.runtime.links.plan import NoLinks

    found: dict[str, Any] = {}

    def run(length: int, prefix: int) -> Callable[[], Any]:
        ids = torch.randint(0, 1000, (1, length), device="cuda")

        def work() -> None:
            cache = chunk_cache(model, ids, prefix=prefix)
            for _, layer in cache.kv_layers:
                layer.store.rows[:prefix].normal_() if prefix else None
            torch.cuda.synchronize()
            began = time.perf_counter()
            run_chunk(model, ids, cache, rank=0, ranks=1, links=NoLinks(), layers="auto")
            took.append(time.perf_counter() - began)

        return work

    took: list[float] = []
    for at in range(count):
        length = tokens - 137 - 211 * at
        for chunk, prefix in ((length, 0), (length - (cut := length * (at + 4) // 10), cut)):
            took.clear()
            work = run(chunk, prefix)
            for _ in range(3):
                work()
            with planning():
                for _ in range(4):
                    work()
            first, again, warm = took[0], median(took[1:3]), median(took[4:])
            found[f"{chunk} behind {prefix}"] = {
                "first_s": first, "again_s": again, "warm_s": warm, "ratio": first / warm
            }  # fmt: skip
    return found


def decoding(model: Any, tokens: int, count: int) -> dict[str, Any]:
    """Milliseconds a token of transformers' own decoding and of ours, at lengths never seen and seen before."""
    from transformers.generation.streamers import BaseStreamer

    from kvr_partition.runtime import decode

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.at: list[float] = []

        def put(self, value: Any) -> None:
            self.at.append(time.perf_counter())

        def end(self) -> None:
            pass

    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device="cuda")
    model.generation_config.eos_token_id = None

    def of_stock() -> list[float]:
        clock = Clock()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, streamer=clock
        )
        return clock.at[1:]

    def ours() -> list[float]:
        clock = Clock()
        out = prefill(model, ids, Partition((tokens,)), reserve=count)
        decode(model, ids, out, count, streamer=clock)
        return clock.at[1:]

    found = {}
    for name, work in (("ours", ours), ("stock", of_stock)):
        for when in ("never seen", "seen before", "seen before, again"):
            at = work()
            steps = [after - before for before, after in itertools.pairwise(at)]
            found[f"{name}, {when}"] = {"median_s": median(steps), "steps_s": steps}
    return found


def main() -> None:
    """Every model in turn; a file for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-7b,llama-3.1-8b")
    parser.add_argument("--contexts", default="512,1024,2048,4096,16384,32768")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--breakdown", default="4096,16384", help="contexts to profile; empty for none")
    parser.add_argument(
        "--warm-up", type=int, default=0, metavar="TOKENS", help="as serving code does; then cold lengths"
    )
    parser.add_argument("--cold", type=int, default=0, metavar="COUNT", help="lengths never seen, up to --warm-up")
    parser.add_argument("--decode", default="", help="contexts to decode behind, like 4096,16384")
    parser.add_argument("--out", type=Path, default=Path("one-rank"))
    options = parser.parse_args()
    contexts = [int(word) for word in options.contexts.split(",") if word]
    profiled = [int(word) for word in options.breakdown.split(",") if word]
    for name in options.models.split(","):
        model = build_model(open_model(model_folder(name)), dtype=options.dtype, device="cuda", seed=0)
        figures: dict[str, Any] = {
            "command": " ".join(["python -m benchmarks.one_rank", *sys.argv[1:]]),
            "device": torch.cuda.get_device_name(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "layers": chosen_layers(model, "auto").name,
            "left": chosen_layers(model, "auto").left,
            "contexts": {},
        }
        print(name, figures["layers"], figures["left"][:3], flush=True)
        path = options.out / name / "one-rank-layers.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if options.warm_up:
            began = time.perf_counter()
            told = warm_up(model, options.warm_up)
            figures["warm_up"] = {
                "tokens": options.warm_up,
                "took_s": time.perf_counter() - began,
                "told": str(told),
            }
            print("  warm-up", figures["warm_up"], flush=True)
        for context in contexts:
            ids = torch.randint(0, model.config.vocab_size, (1, context), device="cuda")
            entry = {"ttft": interleaved(ways(model, ids), options.samples), "floor": floor(model, context, 5)}
            if context in profiled:
                entry["breakdown"] = {way: breakdown(work) for way, work in ways(model, ids).items()}
            figures["contexts"][str(context)] = entry
            path.write_text(json.dumps(figures, indent=1) + "\n")
            medians = {way: round(one["median_s"] * 1e3, 1) for way, one in entry["ttft"].items()}
            print(" ", context, medians, {k: round(v * 1e3, 1) for k, v in entry["floor"].items()}, flush=True)
            for way, kinds in entry.get("breakdown", {}).items():
                told = {key: round(value * 1e3, 1) for key, value in kinds.items() if key.endswith("_s")}
                print("   ", way, told, round(kinds["products_and_attention"], 3), flush=True)
                if way.endswith("fused layers"):
                    for one in kinds["longest"]:
                        print(
                            f"      {one['seconds'] * 1e3:8.2f} {one['calls']:5d} {one['kernel'][:80]}", flush=True
                        )
        if options.cold:
            figures["cold"] = cold(model, options.warm_up, options.cold)
            print("  cold", {key: round(one["ratio"], 3) for key, one in figures["cold"].items()}, flush=True)
            path.write_text(json.dumps(figures, indent=1) + "\n")
        for context in (int(word) for word in options.decode.split(",") if word):
            figures.setdefault("decoding", {})[str(context)] = decoding(model, context, 33)
            told = {key: round(one["median_s"] * 1e3, 1) for key, one in figures["decoding"][str(context)].items()}
            print("  decoding behind", context, told, flush=True)
            path.write_text(json.dumps(figures, indent=1) + "\n")
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
