"""Policy gradients from rollouts: advantages, losses, the scoring policy, Tunix.

    r = rollout(lm, prompts, key=0, num_samples=8)
    states = trace_states(r)                                          # or masked_states(r, key, scheme=...)
    log_probs = score(lm.denoiser, params, r, states)                 # [B, T], differentiable in params
    lm.update_params(params)
"""

from djax.engine.weights import accept
from djax.rollouts.likelihood import log_likelihood
from djax.rollouts.masked_states import Scheme, masked_states, trace_states
from djax.rollouts.rollout import as_rollout, record, rollout, rollout_infill
from djax.rollouts.score import score
from djax.rollouts.types import MaskedStates, Rollout

__all__ = [
    "MaskedStates", "Rollout", "Scheme", "accept", "as_rollout", "log_likelihood", "masked_states", "record", "rollout",
    "rollout_infill", "score", "trace_states",
]
