"""Triton kernels of protoclip; imported as protoclip.kernels, one file per op."""
