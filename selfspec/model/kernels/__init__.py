"""Our own kernels: what is slow in torch where a model is small and a pass is short."""
