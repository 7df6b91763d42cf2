"""The architectures, and how a model becomes a denoiser."""

from djax.devices.parallel import Parallel, parallel_on
from djax.models.build import abstract_params, build, init_params, logical_axes
from djax.models.denoiser import Guided, ModelDenoiser
from djax.models.kernels import Kernels, kernels_on
from djax.models.llada2_moe import Llada2Moe
from djax.models.llada_moe import LladaMoe

__all__ = [
    "Guided", "Kernels", "Llada2Moe", "LladaMoe", "ModelDenoiser", "Parallel", "abstract_params", "build",
    "init_params", "kernels_on", "logical_axes", "parallel_on",
]
