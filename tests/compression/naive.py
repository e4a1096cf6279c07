"""Optimal Brain Surgeon as the papers have it, in float64 NumPy: columns struck out of inv(H), one by one."""

import numpy as np


def problem(n_out, n_in, seed=0, tokens=400, rank=0.4):
    """Weights (not centred) and the Hessian of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(round(rank * n_in), n_in))
    x = rng.normal(size=(tokens, len(mix))) @ mix + 0.5 * rng.normal(size=(tokens, n_in))
    x *= rng.uniform(0.3, 2, n_in)
    w = rng.normal(size=(n_out, n_in)) * rng.uniform(0.5, 2, (n_out, 1)) + 0.2
    return w.astype(np.float32), (x.T @ x / tokens).astype(np.float32)


def prepared(w, h, damping=0.01):
    """Float64, with dead columns as everyone treats them and the damping on the diagonal."""
    w, h = w.astype(np.float64), h.astype(np.float64)
    dead = np.diag(h) == 0
    w[:, dead], h[dead, dead] = 0, np.diag(h)[~dead].mean()
    return w, h + damping * np.diag(h).mean() * np.eye(len(h))


def loss(w, q, h):
    return np.trace((w - q) @ h @ (w - q).T)


def grid(part, bits, symmetric):
    """Scale and zero ``[out]`` of the columns ``part``, by the definition of ``core.leaves.QArray``."""
    low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
    span = 2 * np.maximum(-low, high) if symmetric else high - low
    scale = np.where(span > 0, span / (2**bits - 1), 1)
    return scale, np.zeros_like(scale) if symmetric else np.rint(-low / scale) - 2 ** (bits - 1)


def obs(w, h, fix, order=None, begin=lambda w, inverse, k: None):
    """Fixes columns in ``order`` with ``fix(column, index)``; ``begin`` sees what is left before the k-th.

    ``w`` and ``h`` are prepared. Returns the fixed weights.
    """
    order = np.arange(w.shape[1]) if order is None else order
    w, inverse, q = w[:, order].copy(), np.linalg.inv(h[np.ix_(order, order)]), np.zeros_like(w)
    for k, index in enumerate(order):
        begin(w, inverse, k)
        q[:, index] = fix(w[:, k], index)
        error = (w[:, k] - q[:, index]) / inverse[k, k]
        w[:, k:] -= np.outer(error, inverse[k, k:])
        inverse = inverse - np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return q


def gptq(w, h, bits, group, symmetric, act_order=False, static=True, kept=None):
    """Codes, scales, zeros and, per weight, how far its rounding was from the other side (in steps)."""
    group = group or w.shape[1]
    kept = np.ones(w.shape, bool) if kept is None else kept
    starts = range(0, w.shape[1], group)
    grids = [grid(np.where(kept, w, 0)[:, i : i + group], bits, symmetric) for i in starts]
    codes, margin = np.zeros(w.shape, int), np.zeros(w.shape)

    def begin(now, inverse, k):
        if not static and k % group == 0:
            grids[k // group] = grid(np.where(kept, now, 0)[:, k : k + group], bits, symmetric)

    def fix(column, i):
        scale, zero = grids[i // group]
        place = np.where(kept[:, i], column, 0) / scale
        margin[:, i] = np.abs(np.abs(place % 1) - 0.5)
        codes[:, i] = np.clip(np.rint(place) + zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return (codes[:, i] - zero) * scale

    order = np.argsort(-np.diag(h), kind="stable") if act_order else None
    obs(w, h, fix, order, begin)
    return codes, *(np.stack(x, 1) for x in zip(*grids, strict=True)), margin


def sparsegpt(w, h, sparsity=None, pattern=None, block=128, fix=lambda column, index: column):
    """Weights and where they were kept; ``fix`` rounds."""
    kept = np.ones(w.shape, bool)

    def begin(now, inverse, k):
        width = pattern[1] if pattern else block
        if k % width:
            return
        part = slice(k, k + width)
        # what removing the weight alone costs once the columns before it are fixed: the diagonal of its own elimination
        left, diagonal = inverse.copy(), []
        for i in range(k, min(k + width, w.shape[1])):
            diagonal.append(left[i, i])
            left = left - np.outer(left[:, i], left[i]) / left[i, i]
        cost = now[:, part] ** 2 / diagonal
        if pattern:
            ranks = np.argsort(np.argsort(-cost, 1, kind="stable"), 1, kind="stable")
            kept[:, part] = ranks < pattern[0]
        else:
            limit = np.sort(cost.ravel())[round(sparsity * cost.size) - 1]
            kept[:, part] = cost > limit

    return obs(w, h, lambda column, i: fix(np.where(kept[:, i], column, 0), i), begin=begin), kept
