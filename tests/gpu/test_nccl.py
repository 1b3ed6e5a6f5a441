"""Process ranks over NCCL, a GPU each. Skipped with fewer than two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvr_partition import Partition
from kvr_partition.errors import UnsupportedError
from kvr_partition.methods import METHODS
from profiler import Candidate, RankGroup
from tests.models import write_folder

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("name", ["llama-gqa", "falcon-mqa", "mistral-window", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_method_over_nccl_equals_one_rank(name: str, dtype: str, tmp_path: Path) -> None:
    ranks = min(torch.cuda.device_count(), 4)
    uneven = Partition({2: (301, 99), 3: (200, 150, 50), 4: (150, 120, 80, 50)}[ranks])
    changes = {} if name == "gpt2" else {"hidden_size": 256, "num_attention_heads": 4}
    folder = write_folder(tmp_path / name, name, **changes)
    with RankGroup(folder, ranks=ranks, backend="cuda", dtype=dtype, timeout_s=200) as group:
        verified = []
        for bandwidth in (None, 5e9):
            group.hold_links(bandwidth)
            for method in METHODS:
                split = uneven if method.startswith("kvr") else Partition.even(400, ranks)
                candidate = Candidate(method, split, noise=100_000 if bandwidth is not None else 0)
                if METHODS[method].alone or not METHODS[method].verifiable or method == "tp":
                    continue
                try:
                    group.check(candidate)
                except UnsupportedError:
                    continue
                certificate = group.verify(candidate)
                assert certificate.holds, (method, bandwidth, certificate.divergence)
                verified.append(method)
        assert {"kvr-chain", "kvr-fanout", "tsp"} <= set(verified)
        sample = group.sample(Candidate("kvr", uneven, noise=100_000))
        assert sample.kv_bytes > 0
        assert all(rank.compute_s > 0 for rank in sample.ranks)
        assert all(rank.transfer_s > 0 for rank in sample.ranks[:-1])
        assert all(len(times) == 3 for times in group.time_links(1 << 16, 3))
        # With next to everything on the first rank, that is the rank that the bound waits for.
        first = Candidate("bound", Partition((400 - 8 * (ranks - 1), *(8,) * (ranks - 1))))
        bound = group.sample(first)
        assert bound.ttft_s >= bound.ranks[0].compute_s


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tensor_parallelism_over_nccl_equals_one_rank(dtype: str, tmp_path: Path) -> None:
    # Older transformers cut a vocabulary into equal parts only.
    folder = write_folder(tmp_path / "llama", "llama-mha", hidden_size=256, vocab_size=256)
    with RankGroup(folder, ranks=2, backend="cuda", dtype=dtype, timeout_s=200) as group:
        certificate = group.verify(Candidate.even("tp", 400, 2))
        assert certificate.holds, certificate.divergence
