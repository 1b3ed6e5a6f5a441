"""Read prompts on all ranks of a torchrun world, split as a predictor says, and decode on the last rank.

    torchrun --nproc-per-node 2 examples/serve.py MODEL_FOLDER PREDICTOR_OR_TABLE < prompts.txt

Each line of standard input is a prompt, as token ids separated by spaces; each line of output its new tokens. A
prompt that cannot be read is told on standard error, and the next one is read. Once a rank has failed, or ranks
disagree, none of them goes on: KV of a prompt that failed must not end up in the answer to another one.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from kvr_partition import KVRError, OutOfRangeError, Partition, RankError, load
from kvr_partition.runtime import decode, link_group, load_model, prefill, single, warm_up


def main() -> None:
    """One rank."""
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    links = link_group()
    # A folder with a configuration only gets the same random weights everywhere.
    model = load_model(sys.argv[1], device=device, seed=0)
    planner = load(sys.argv[2])
    warm_up(model, tokens=256)
    while (ids := received(device)) is not None:
        try:
            if ids.shape[1] < ranks:
                # Too short to be split: the last rank reads it alone.
                out = single(model, ids) if rank == ranks - 1 else None
            else:
                try:
                    out = prefill(model, ids, planner, group=links)
                except OutOfRangeError as error:
                    # Too short or too long for what was searched: say so and go on with an even split.
                    if rank == 0:
                        print(f"even split: {error}", file=sys.stderr)
                    out = prefill(model, ids, Partition.even(ids.shape[1], ranks), group=links)
            if out is not None and out.is_last:
                print(*decode(model, ids, out, max_new_tokens=8)[0].tolist(), flush=True)
        except RankError as error:
            # Every rank comes here, at this prompt or the next.
            sys.exit(f"rank {rank} ends: {error}")
        except KVRError as error:
            # Refused by all ranks alike, before anything was sent; or found by the last one, when all was done.
            if rank == ranks - 1:
                print(f"no answer: {error}", file=sys.stderr)
    dist.destroy_process_group()


def received(device: torch.device) -> torch.Tensor | None:
    """The next prompt, which rank 0 reads, on every rank; None when there are no more."""
    ids = [next_prompt() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(ids)
    return None if ids[0] is None else torch.tensor([ids[0]], device=device)


def next_prompt() -> list[int] | None:
    """The token ids of the next line that has some; None at the end."""
    for line in sys.stdin:
        try:
            ids = [int(word) for word in line.split()]
        except ValueError:
            print(f"no answer: a prompt is token ids separated by spaces; got {line.strip()!r}", file=sys.stderr)
            continue
        if any(not -(2**63) <= one < 2**63 for one in ids):
            print("no answer: a token id is beyond 64 bits", file=sys.stderr)
        elif ids:
            return ids
    return None


if __name__ == "__main__":
    main()
