"""The vocabulary head without logits in memory."""

from kernels_pallas.unembed.api import IMPLEMENTATIONS, unembed, unembed_choice
from kernels_pallas.unembed.combine import combine_readouts
from kernels_pallas.unembed.noise import gumbel_noise
from kernels_pallas.unembed.types import Readout

__all__ = ["IMPLEMENTATIONS", "Readout", "combine_readouts", "gumbel_noise", "unembed", "unembed_choice"]
