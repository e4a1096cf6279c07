"""Optimizers, and what wraps them: sparsity and privacy."""
