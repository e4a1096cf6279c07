import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compression.low_rank import low_rank, rank_for
from jaxlm.core.errors import UserError


def weights(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (2, 3, 12, 20)])
def test_the_plain_factors_are_the_truncated_svd(shape):
    w = weights(shape)
    a, b = low_rank(jnp.asarray(w, jnp.float32), 5)
    assert a.shape == (*shape[:-1], 5) and b.shape == (*shape[:-2], 5, shape[-1])
    left, values, right = np.linalg.svd(w, full_matrices=False)
    want = (left[..., :5] * values[..., None, :5]) @ right[..., :5, :]
    np.testing.assert_allclose(a @ b, want, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(a, axis=-2), np.linalg.norm(b, axis=-1), rtol=1e-4)


def test_a_gram_matrix_gives_the_best_product_with_the_inputs():
    """Against the solution of the reduced-rank regression in float64, a stack of layers."""
    w, x = weights((2, 12, 20)), weights((2, 200, 12), 1) * np.geomspace(0.05, 5, 12)
    x = x @ weights((2, 12, 12), 2)
    a, b = low_rank(jnp.asarray(w, jnp.float32), 4, gram=jnp.asarray(x.swapaxes(1, 2) @ x / 200), damping=0.0)
    plain = np.matmul(*low_rank(jnp.asarray(w, jnp.float32), 4))
    for i in range(2):
        y = x[i] @ w[i]
        left, values, right = np.linalg.svd(y, full_matrices=False)
        least = np.linalg.norm(values[4:])
        got = np.linalg.norm(y - x[i] @ np.asarray(a[i] @ b[i], np.float64))
        assert least * (1 - 1e-6) <= got < least * 1.001
        assert got < 0.7 * np.linalg.norm(y - x[i] @ plain[i])
        np.testing.assert_allclose(np.linalg.norm(a[i], axis=0), np.linalg.norm(b[i], axis=1), rtol=1e-4)


@pytest.mark.parametrize("rank", [3, 12])
def test_inputs_that_never_occur_do_no_harm(rank):
    w, x = weights((12, 8)), weights((50, 12))
    x[:, 3:7] = 0
    for seen in (x, 0 * x):
        a, b = low_rank(jnp.asarray(w, jnp.float32), min(rank, 8), gram=jnp.asarray(seen.T @ seen))
        assert jnp.isfinite(a @ b).all()
        if rank == 12:  # all of it: nothing is lost, seen or not
            np.testing.assert_allclose(a @ b, w, atol=1e-3)


def test_energy_keeps_what_the_most_demanding_matrix_needs():
    basis = [np.linalg.qr(weights((16, 16), seed))[0] for seed in (0, 1)]
    flat, steep = (basis[0] * (values**0.5) @ basis[1] for values in (np.ones(16), 0.5 ** np.arange(16)))
    stack = jnp.asarray(np.stack([steep, flat]), jnp.float32)
    assert low_rank(stack[:1], energy=0.9)[0].shape[-1] == 4  # 1 - 2 ** -4 = 0.9375
    assert low_rank(stack, energy=0.75)[0].shape[-1] == 12
    a, b = low_rank(stack, energy=1.0)
    np.testing.assert_allclose(a @ b, stack, atol=1e-5)
    assert not low_rank(jnp.zeros((4, 4)), 1)[0].any()


def test_ranks():
    assert rank_for((3, 256, 704), 0.5) == 93 and 93 * (256 + 704) <= 0.5 * 256 * 704 < 94 * (256 + 704)
    assert rank_for((4, 4), 0.01) == 1
    w = jnp.ones((4, 6))
    for options, reason in (({}, "either"), ({"rank": 5}, "5 is impossible"), ({"energy": 0.0}, "energy"),
                            ({"rank": 1, "energy": 0.5}, "either")):
        with pytest.raises(UserError, match=reason):
            low_rank(w, **options)
