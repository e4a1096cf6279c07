"""A cache in pages: keys and values of many sequences in one pool, and attention that reads them where they are.

The slots of a sequence lie in pages of a pool, wherever some were free (arXiv:2309.06180): a table says in which. So
memory is taken as a sequence grows, sequences that begin alike can share pages, and rows of a batch come and go without
anything being moved. Who has which page is the business of ``jaxlm.inference``; page 0 is nobody's, what is not real is
written there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxlm.nn.attention.kv_cache import KVArray, empty, mix, scores
from jaxlm.nn.attention.ring import NEGATIVE, MaskSpec, causal_mask, online_softmax_update, window_mask
from jaxlm.nn.config import KVCache
from jaxlm.nn.layers import softcap

_SPAN = 128  # slots that several queries, or the rows of an accelerator, look at together


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagePool:
    """Keys and values of all sequences."""

    keys: tuple[KVArray, ...]  # a layer group: [L, pages, slots of a page, G, K]
    values: tuple[KVArray, ...]

    @classmethod
    def empty(
        cls, layers: tuple[int, ...], pages: int, heads: int, size: int, d_head: int, kind: KVCache, dtype: str
    ) -> PagePool:
        """A pool for layer groups of so many layers with ``heads`` key/value heads of size ``d_head``."""
        layer_groups = [empty((count, pages, size, heads, d_head), kind, dtype) for count in layers]
        keys, values = zip(*layer_groups, strict=True)
        return cls(keys, values)

    @property
    def size(self) -> int:
        """Slots of a page."""
        return self.keys[0].shape[2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """What decoding remembers of a batch, in the pages of a pool; takes the place of ``cache.Cache`` in ``decode``.

    Each row goes on at its own slot. New tokens that are not ``real`` are computed and forgotten: they fill up a batch
    whose rows have different numbers of them, or are none of any row.
    """

    pool: PagePool
    table: jax.Array  # int32 [B, P]: the pages of each row, in order; 0 where it has none
    index: jax.Array  # int32 [B]: the slot of each row's first new token
    real: jax.Array  # bool [B, T]

    memory: ClassVar[tuple] = ()  # it is one of language models
    memory_mask: ClassVar[None] = None

    def replace(self, **changes: Any) -> PagedCache:
        return replace(self, **changes)

    def extend(self, count: int) -> tuple[PagedCache, MaskSpec, None, jax.Array]:
        """As ``Cache.extend``; there is no mask, for attention makes one of each page."""
        new_BxT = self.index[:, None] + jnp.arange(count)
        slots = jnp.arange(self.table.shape[1] * self.pool.size)[None]
        return self, MaskSpec(new_BxT, slots), None, jnp.where(self.real, new_BxT, 0)

    def layer_group(self, i: int) -> LayerPages:
        """That of the first layer of a layer_group."""
        size = self.pool.size
        new_BxT = self.index[:, None] + jnp.arange(self.real.shape[1])
        page_BxT = jnp.take_along_axis(self.table, jnp.clip(new_BxT // size, 0, self.table.shape[1] - 1), axis=1)
        end_B = jnp.max(jnp.where(self.real, new_BxT + 1, 0), axis=1)
        return LayerPages(
            self.pool.keys[i], self.pool.values[i], jnp.int32(0), self.table, jnp.where(self.real, page_BxT, 0),
            new_BxT % size, end_B,
        )

    def written(self, layer_groups: list[LayerPages], count: int) -> PagedCache:
        """With what the layers wrote, of ``count`` tokens a row."""
        keys, values = (tuple(getattr(each, name) for each in layer_groups) for name in ("keys", "values"))
        return replace(self, pool=PagePool(keys, values), index=self.index + count)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerPages:
    """One layer's place in a layer group's pool, which is carried through the scan and written in place.

    A slot has all its heads together: what is written to it is one piece of memory, and what says where are the leading
    dimensions. With heads before slots XLA on TPU copies the whole pool at every layer.
    """

    keys: KVArray  # [L, pages, slots of a page, G, K]
    values: KVArray
    layer: jax.Array
    table: jax.Array  # [B, P]
    page: jax.Array  # [B, T]: where the new tokens go
    offset: jax.Array  # [B, T]
    end: jax.Array  # [B]: slots of each row, the new ones included; 0: a row of nothing

    def write(self, k_BxGxTxK: KVArray, v_BxGxTxK: KVArray) -> LayerPages:
        """With the new tokens, kept as those of the pool are."""

        def into(pool, new):
            return pool.at[self.layer, self.page, self.offset].set(new.swapaxes(1, 2).astype(pool.dtype))

        keys, values = jax.tree.map(into, (self.keys, self.values), (k_BxGxTxK, v_BxGxTxK))
        return replace(self, keys=keys, values=values)

    def read(self, pages_N: jax.Array) -> tuple[KVArray, KVArray]:
        """Keys and values of some pages, one after the other: ``[1, G, N * slots, K]`` each."""

        def of(pool):
            x = pool[self.layer, pages_N]
            return x.reshape(-1, *x.shape[2:]).swapaxes(0, 1)[None]

        return jax.tree.map(of, (self.keys, self.values))


def attend_pages(
    q_BxTxHxK: jax.Array, past: LayerPages, mask_spec: MaskSpec, bias_BxHxTxS: jax.Array | None = None, *, scale: float,
    cap: float = 0.0,
) -> jax.Array:
    """``nn.attention.layer.attend`` over the pages of each row, causal: ``[B, T, H, K]``.

    A row looks at a few pages at a time and adds them to an online softmax (arXiv:1805.02867): at no more pages than it
    has and, where layers have a window, than that shows. Nothing is copied out of the pool but these. On CPU the rows
    take turns, so that each looks at its own pages only; elsewhere they go together.
    """
    over_rows = partial(_rows, q_BxTxHxK, past, mask_spec, bias_BxHxTxS, scale, cap)
    return jax.lax.platform_dependent(
        cpu=partial(over_rows, one_by_one=True), default=partial(over_rows, one_by_one=False)
    )


def _rows(q_BxTxHxK, past: LayerPages, mask_spec: MaskSpec, bias_BxHxTxS, scale, cap, *, one_by_one: bool) -> jax.Array:
    T, H, K = q_BxTxHxK.shape[1:]
    _, _, size, G, _ = past.keys.shape
    span = 1 if one_by_one and T == 1 else max(1, _SPAN // size)  # pages at a time
    short = -past.table.shape[1] % span
    table_BxP = jnp.pad(past.table, ((0, 0), (0, short)))

    def row(xs):
        q_TxHxK, slots_T, table_P, end, bias_HxTxS = xs
        q_1xGxNxK = (q_TxHxK * scale).reshape(T, G, H // G, K).transpose(1, 2, 0, 3).reshape(1, G, -1, K)
        if bias_HxTxS is not None:
            bias_HxTxS = jnp.pad(bias_HxTxS, ((0, 0), (0, 0), (0, short * size)))

        def look(i, carry):
            k, v = past.read(jax.lax.dynamic_slice_in_dim(table_P, i * span, span))
            logits_HxTxS = softcap(scores(q_1xGxNxK, k).reshape(H, T, -1), cap)
            slots_S = i * span * size + jnp.arange(span * size)
            if bias_HxTxS is not None:
                logits_HxTxS += jax.lax.dynamic_slice_in_dim(bias_HxTxS, i * span * size, span * size, axis=2)
            mask = causal_mask(slots_T[None], slots_S[None])
            if mask_spec.window is not None:
                mask &= window_mask(slots_T[None], slots_S[None], mask_spec.window)
            logits_HxTxS = jnp.where(mask, logits_HxTxS, NEGATIVE)

            def values(weights):
                return mix(weights.reshape(1, G, -1, span * size), v, q_TxHxK.dtype).reshape(H, T, K)

            return online_softmax_update(*carry, logits_HxTxS, values)

        # What is masked counts as NEGATIVE: the first slot that is seen makes the weight of those before it nothing.
        first = 0 if mask_spec.window is None else jnp.where(
            mask_spec.window > 0, jnp.maximum(slots_T[0] - mask_spec.window + 1, 0) // (span * size), 0
        )
        carry = (jnp.full((H, T), NEGATIVE), jnp.zeros((H, T)), jnp.zeros((H, T, K)))
        _, total, out = jax.lax.fori_loop(first, -(-end // (span * size)), look, carry)
        return (out / jnp.where(total > 0, total, 1)[..., None]).transpose(1, 0, 2).astype(q_TxHxK.dtype)

    xs = (q_BxTxHxK, mask_spec.slots_q, table_BxP, past.end, bias_BxHxTxS)
    return jax.lax.map(row, xs) if one_by_one else jax.vmap(row)(xs)
