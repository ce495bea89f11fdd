"""What the kernels cost: resources of compiled kernels, predicted times, cards."""
