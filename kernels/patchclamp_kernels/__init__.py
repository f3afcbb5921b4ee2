"""Triton kernels for white-box serving, each with the torch reference that defines it."""
