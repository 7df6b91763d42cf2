"""The architectures, and how a model becomes a denoiser."""

from djax.models.build import abstract_params, build, init_params, logical_axes
from djax.models.denoiser import Guided, ModelDenoiser
from djax.models.llada_moe import LladaMoe

__all__ = ["Guided", "LladaMoe", "ModelDenoiser", "abstract_params", "build", "init_params", "logical_axes"]
