"""Run a prefill on real ranks: KV-Runahead, and the baselines it is compared with."""

from kvr_partition.runtime.agreement import renew
from kvr_partition.runtime.baselines import single, stock, tsp, zigzag
from kvr_partition.runtime.decoding import check_generation, decode
from kvr_partition.runtime.links.group import (
    link_group,
    link_memory_use,
    release_link_memory,
    reserve_link_memory,
)
from kvr_partition.runtime.links.plan import LinkLimits
from kvr_partition.runtime.loading import load_model, load_tokenizer
from kvr_partition.runtime.prefill import PrefillResult, WarmUp, prefill, warm_up
from kvr_partition.runtime.support import ModelSupport, check_config, check_context, probe

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
