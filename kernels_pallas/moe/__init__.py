"""Mixture of SwiGLU experts: every row goes through the experts that its router chose."""

from kernels_pallas.moe.api import (
    IMPLEMENTATIONS,
    QUANTIZED_IMPLEMENTATIONS,
    moe,
    moe_choice,
    moe_quantized,
    moe_quantized_choice,
)
from kernels_pallas.moe.quantized import QuantizedExperts, dequantize_experts, quantize_experts
from kernels_pallas.moe.router import ROUTE_IMPLEMENTATIONS, top_k_route, top_k_route_choice

__all__ = [
    "IMPLEMENTATIONS", "QUANTIZED_IMPLEMENTATIONS", "ROUTE_IMPLEMENTATIONS", "QuantizedExperts", "dequantize_experts",
    "moe", "moe_choice", "moe_quantized", "moe_quantized_choice", "quantize_experts", "top_k_route",
    "top_k_route_choice",
]
