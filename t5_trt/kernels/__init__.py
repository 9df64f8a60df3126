"""The library's CUDA kernels for decoder step and encoder: sources, compilation, weight layout and launches."""
