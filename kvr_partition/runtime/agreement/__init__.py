"""Agreement: ranks of a group take turns together, one prefill after the other, or raise.

Before any KV is posted, every rank states what it is about to run, and runs it only if all others are about to run
the same. A rank that fails says so to the others; from then on the group is unusable until `renew` has given it
links on which nothing of the failed prefill can arrive.
"""

from kvr_partition.runtime.agreement.core import Agreement, Guarded, agreement_of, renew
from kvr_partition.runtime.agreement.failures import as_rank_error, is_link_error
from kvr_partition.runtime.agreement.turn import Turn

__all__ = ["Agreement", "Guarded", "Turn", "agreement_of", "as_rank_error", "is_link_error", "renew"]
