"""Read prompts on all ranks of a torchrun world, split as a predictor says, and decode on the last rank.

    torchrun --nproc-per-node 2 examples/serve.py MODEL_FOLDER PREDICTOR_OR_TABLE < prompts.txt

Each line of standard input is a prompt, as token ids separated by spaces; each line of output its new tokens.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from kvr_partition import KVRError, Partition, load
from kvr_partition.runtime import decode, link_group, prefill, warm_up


def main() -> None:
    """One rank."""
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    links = link_group()
    model = loaded(sys.argv[1]).to(device).eval()
    knows = load(sys.argv[2])
    warm_up(model, tokens=256)
    while (ids := received(device)) is not None:
        try:
            out = prefill(model, ids, knows, group=links)
        except KVRError as error:
            # Too short or too long for what was searched: say so and go on with an even split.
            if rank == 0:
                print(f"even split: {error}", file=sys.stderr)
            out = prefill(model, ids, Partition.even(ids.shape[1], ranks), group=links)
        if out.is_last:
            print(*decode(model, ids, out, max_new_tokens=8)[0].tolist(), flush=True)
    dist.destroy_process_group()


def loaded(folder: str) -> Any:
    """A checkpoint; of a folder with a configuration only, the same random weights everywhere."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except OSError:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))


def received(device: torch.device) -> torch.Tensor | None:
    """The next prompt, which rank 0 reads, on every rank; None when there are no more."""
    line = [sys.stdin.readline().split() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(line)
    words = line[0]
    return torch.tensor([[int(word) for word in words]], device=device) if words else None


if __name__ == "__main__":
    main()
