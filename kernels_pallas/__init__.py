"""Kernels that know only JAX. Each op ships its reference: its oracle, its fallback too."""

from kernels_pallas.attention import attention, attention_choice
from kernels_pallas.moe import (
    QuantizedExperts,
    dequantize_experts,
    moe,
    moe_choice,
    moe_quantized,
    moe_quantized_choice,
    quantize_experts,
    top_k_route,
    top_k_route_choice,
)
from kernels_pallas.unembed import Readout, combine_readouts, gumbel_noise, unembed, unembed_choice

__all__ = [
    "QuantizedExperts", "Readout", "attention", "attention_choice", "combine_readouts", "dequantize_experts",
    "gumbel_noise", "moe", "moe_choice", "moe_quantized", "moe_quantized_choice", "quantize_experts", "top_k_route",
    "top_k_route_choice", "unembed", "unembed_choice",
]
