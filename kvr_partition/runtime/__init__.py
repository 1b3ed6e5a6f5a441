"""Run a prefill on real ranks: KV-Runahead, and the baselines it is compared with."""

from kvr_partition.runtime.agreement import renew
from kvr_partition.runtime.decoding import check_generation, decode
from kvr_partition.runtime.gathering import tsp, zigzag
from kvr_partition.runtime.links.group import (
    link_group,
    link_memory_use,
    release_link_memory,
    reserve_link_memory,
)
from kvr_partition.runtime.links.plan import LinkLimits
from kvr_partition.runtime.loading import load_model, load_tokenizer
from kvr_partition.runtime.one_rank import single, stock
from kvr_partition.runtime.positions import check_context
from kvr_partition.runtime.prefill import prefill
from kvr_partition.runtime.result import PrefillResult
from kvr_partition.runtime.support import ModelSupport, check_config, probe
from kvr_partition.runtime.warming import WarmUp, warm_up

__all__ = [
    "LinkLimits",
    "ModelSupport",
    "PrefillResult",
    "WarmUp",
    "check_config",
    "check_context",
    "check_generation",
    "decode",
    "link_group",
    "link_memory_use",
    "load_model",
    "load_tokenizer",
    "prefill",
    "probe",
    "release_link_memory",
    "renew",
    "reserve_link_memory",
    "single",
    "stock",
    "tsp",
    "warm_up",
    "zigzag",
]
