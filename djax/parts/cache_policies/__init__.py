"""Cache policies: which positions the next forward recomputes.

A refresh depends on the block index and the step in the block only, never on a row, so that a row of a
batch sees what it sees alone.
"""

from djax.parts.cache_policies.block_causal import BlockCausal
from djax.parts.cache_policies.none import NoCache
from djax.parts.cache_policies.prefix_dual import Dual, Prefix
from djax.parts.cache_policies.vicinity import Vicinity
from djax.parts.cache_policies.wrappers import Periodic, WithWarmup

__all__ = ["BlockCausal", "Dual", "NoCache", "Periodic", "Prefix", "Vicinity", "WithWarmup"]
