"""Triton kernels. Most machines have no Triton: importing what is here must not need it."""
