"""Triton kernels. Nothing here is imported unless it is asked for by its full name: most machines have no Triton."""
