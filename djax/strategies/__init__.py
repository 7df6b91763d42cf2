"""Strategies: which candidates to commit. One file per family, and wrappers that hold another strategy."""

from djax.strategies.factor import Factor
from djax.strategies.hierarchical import Hierarchical
from djax.strategies.quota import Quota
from djax.strategies.threshold import Threshold
from djax.strategies.wrappers import RandomOrder, Remasking

__all__ = ["Factor", "Hierarchical", "Quota", "RandomOrder", "Remasking", "Threshold"]
