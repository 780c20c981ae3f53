"""Fused GPU kernels: one source for Metal, CUDA and a host emulator (`docs/kernels.md`)."""
