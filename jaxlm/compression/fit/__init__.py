"""Fits a model to a budget: the bits, group and sparsity of each kernel that cost the least loss."""
