"""The decoder's own CUDA kernels: sources, compilation, weights in their order, and a step as a chain of launches."""
