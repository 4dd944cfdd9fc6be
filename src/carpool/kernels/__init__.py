"""Routing in two launches on GPUs: Triton kernels for the policies that serving uses."""
