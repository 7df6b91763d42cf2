"""Tests of `kernels_pallas`, interpreted or compiled from afar."""
