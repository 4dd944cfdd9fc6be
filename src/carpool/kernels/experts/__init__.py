"""Kernels that read experts at a depth: the planes of every expert a row needs, each as deep as that row asks."""
