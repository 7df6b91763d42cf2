"""A model that compiles fast: random weights, large enough that it is sure of some tokens."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

import djax
from djax.devices.sharding import leaf_name
from djax.models import Kernels, init_params
from djax.models.config import LladaMoeConfig

MASK, EOS, PAD = 63, 62, 61
CONFIG = LladaMoeConfig(
    vocab_size=64, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=4, num_experts=4,
    experts_per_token=2, expert_size=8, rms_norm_eps=1e-5, rope_theta=1e4, max_positions=64, mask_id=MASK, eos_id=EOS,
    pad_id=PAD, dtype="float32")
KERNELS = Kernels(moe="xla_dense", attention="xla")
"""What accelerators run on a mesh (`djax.models.kernels_on`)."""


def load(mesh: Mesh | None = None) -> djax.DiffusionLM:
    """The same weights every time."""
    params = init_params(CONFIG, jax.random.key(0))[1]
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (60 if leaf_name(path) == "head" else 15) if leaf.ndim > 1 else leaf, params)
    return djax.DiffusionLM(CONFIG, jax.device_put(params, jax.devices()[0]), mesh=mesh, kernels=KERNELS)
