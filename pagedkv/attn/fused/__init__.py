"""Attention, sealing and dequantizing by kernels, and their check on this machine."""
