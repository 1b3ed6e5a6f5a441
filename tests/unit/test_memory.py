"""What a prefill takes on a GPU, counted; what has no room is refused in one line."""

from __future__ import annotations

import pytest

from kvr_partition import Partition, UnsupportedError
from kvr_partition.runtime.rows import LayerKV
from profiler.memory import APART, Shape, check_fits

GIB = 1 << 30
LLAMA_8B = 16_060_522_496


def llama_8b(fused: bool = True, batch: int = 1, window: int | None = None) -> Shape:
    return Shape([LayerKV(8, 128, 8, 128, window)] * 32, 4096, 4096, 14336, 2, batch, fused)


def test_kv_is_what_a_rank_sees() -> None:
    assert llama_8b().kv(1000) == 1000 * 32 * 2 * 1024 * 2
    assert llama_8b(batch=3).kv(1000) == 3 * llama_8b().kv(1000)
    assert llama_8b(window=101).kv(1000) == llama_8b().kv(100)


def test_a_long_chunk_takes_no_more_for_its_mlp() -> None:
    long, longer = (llama_8b().working(tokens) for tokens in (65536, 131072))
    assert longer - long == 65536 * 8 * 4096 * 2
    assert llama_8b(fused=False).working(65536) > long + 3 * 14336 * 2 * 60000


def test_a_prompt_of_131072_tokens_fits_on_one_80_gb_gpu_and_more_do_not() -> None:
    check_fits(llama_8b(), Partition((131072,)), LLAMA_8B, 79 * GIB, together=False)
    check_fits(llama_8b(), Partition.even(131072, 2), LLAMA_8B, 79 * GIB, together=False)
    with pytest.raises(UnsupportedError) as error:
        check_fits(llama_8b(), Partition.even(600_000, 4), LLAMA_8B, 79 * GIB, together=False)
    text = str(error.value)
    assert text.startswith("context 600000 does not fit: rank 3 needs up to ")
    assert "(weights 15.0, KV 73.2, working " in text
    assert "and the GPU has 79.0" in text
    assert "\n" not in text


def test_ranks_of_one_gpu_need_room_together() -> None:
    split = Partition.even(131072, 8)
    check_fits(llama_8b(), split, LLAMA_8B, 79 * GIB, together=False)
    with pytest.raises(UnsupportedError, match="the ranks of this GPU need up to"):
        check_fits(llama_8b(), split, LLAMA_8B, 79 * GIB, together=True)


def test_what_is_not_known_is_not_refused() -> None:
    check_fits(llama_8b(), Partition((1 << 24,)), LLAMA_8B, 0, together=False)
    assert llama_8b().working(1) > APART
