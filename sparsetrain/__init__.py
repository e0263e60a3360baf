"""Training-time sparsity on PyTorch Lightning: masks that hold through every optimizer step."""
