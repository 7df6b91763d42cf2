"""Strategies: which candidates to commit. One file per family; wrappers hold another strategy."""

from djax.parts.strategies.factor import Factor
from djax.parts.strategies.hierarchical import Hierarchical
from djax.parts.strategies.local_leap import LocalLeap
from djax.parts.strategies.quota import Quota
from djax.parts.strategies.threshold import Threshold
from djax.parts.strategies.wrappers import RandomOrder, Remasking

__all__ = ["Factor", "Hierarchical", "LocalLeap", "Quota", "RandomOrder", "Remasking", "Threshold"]
