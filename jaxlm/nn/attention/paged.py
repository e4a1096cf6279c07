"""The paged cache: keys and values of many sequences in one pool, and attention that reads them where they are.

The slots of a sequence lie in pages of a pool, in any order (PagedAttention, arXiv:2309.06180); a table lists the pages
of each row. So memory is taken as a sequence grows, sequences with a common beginning can share pages, and rows of a
batch come and go without a copy. ``jaxlm.inference`` decides which sequence has which page. Page 0 belongs to no
sequence: tokens that are not real are written there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxlm.nn.attention.masks import MASKED_LOGIT, MaskSpec, causal_mask, window_mask
from jaxlm.nn.attention.quantized_kv import KVArray, empty_kv, query_key_scores, weighted_values
from jaxlm.nn.attention.softmax import add_sinks, online_softmax_update
from jaxlm.nn.config import KVCache
from jaxlm.nn.layers import softcap

__all__ = ["LayerPages", "PagePool", "PagedCache", "attend_pages"]

_SPAN = 128  # slots read at a time by several queries of a row, or on an accelerator


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagePool:
    """Keys and values of all sequences."""

    keys: tuple[KVArray, ...]  # for each layer group [L, pages, slots of a page, G, K]
    values: tuple[KVArray, ...]

    @classmethod
    def empty(
        cls, layers: tuple[int, ...], pages: int, heads: int, size: int, d_head: int, kind: KVCache, dtype: str
    ) -> PagePool:
        """A pool for layer groups of these lengths: ``pages`` pages of ``size`` slots, ``heads`` key/value heads."""
        groups = [empty_kv((count, pages, size, heads, d_head), kind, dtype) for count in layers]
        keys, values = zip(*groups, strict=True)
        return cls(keys, values)

    @property
    def size(self) -> int:
        """Slots of a page."""
        return self.keys[0].shape[2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """Keys and values of a batch, in the pages of a pool; ``decode`` takes it in place of a ``kv_cache.Cache``.

    Each row continues at its own slot. New tokens that are not ``real`` are computed and forgotten: they fill up rows
    with fewer new tokens than others, and rows of no sequence.
    """

    pool: PagePool
    table: jax.Array  # int32 [B, P]: the pages of each row, in order; 0 after the last
    index: jax.Array  # int32 [B]: the slot of each row's first new token
    real: jax.Array  # bool [B, T]
    length: jax.Array | None = None  # int32 [B]: of each row's text; None: what has been read, the new tokens included

    memory: ClassVar[tuple] = ()  # only decoder-only models use pages
    memory_mask: ClassVar[None] = None

    @property
    def rotary_length_Rx1(self) -> jax.Array:
        """As ``Cache.rotary_length_Rx1``."""
        length_B = self.index + jnp.sum(self.real, axis=1) if self.length is None else self.length
        return length_B[:, None]

    def replace(self, **changes: Any) -> PagedCache:
        return replace(self, **changes)

    def extend(self, count: int) -> tuple[PagedCache, MaskSpec, None, jax.Array]:
        """As ``Cache.extend``, without a mask array: attention computes the mask of each page."""
        new_BxT = self.index[:, None] + jnp.arange(count)
        slots = jnp.arange(self.table.shape[1] * self.pool.size)[None]
        return self, MaskSpec(new_BxT, slots), None, jnp.where(self.real, new_BxT, 0)

    def first_layer(self, group: int) -> LayerPages:
        """The pages of the first layer of a layer group."""
        size = self.pool.size
        new_BxT = self.index[:, None] + jnp.arange(self.real.shape[1])
        page_BxT = jnp.take_along_axis(self.table, jnp.clip(new_BxT // size, 0, self.table.shape[1] - 1), axis=1)
        end_B = jnp.max(jnp.where(self.real, new_BxT + 1, 0), axis=1)
        return LayerPages(
            self.pool.keys[group], self.pool.values[group], jnp.int32(0), self.table,
            jnp.where(self.real, page_BxT, 0), new_BxT % size, end_B,
        )

    def with_groups(self, groups: list[LayerPages], count: int) -> PagedCache:
        """The cache after every layer group wrote ``count`` tokens a row."""
        keys, values = tuple(each.keys for each in groups), tuple(each.values for each in groups)
        return replace(self, pool=PagePool(keys, values), index=self.index + count)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerPages:
    """The pages of one layer: its index in the pool of its layer group. The pool is carried through ``lax.scan`` and
    written in place.

    Slots come before heads, so that what is written to a slot is one piece of memory, and only leading dimensions say
    where. With heads before slots XLA on TPU copies the whole pool at every layer.
    """

    keys: KVArray  # [L, pages, slots of a page, G, K]
    values: KVArray
    layer: jax.Array  # int32 scalar
    table: jax.Array  # int32 [B, P]
    page: jax.Array  # int32 [B, T]: the page of each new token
    offset: jax.Array  # int32 [B, T]: its slot in that page
    end: jax.Array  # int32 [B]: slots of each row, the new ones included; 0: a row of no sequence

    def write(self, k_BxGxTxK: KVArray, v_BxGxTxK: KVArray) -> LayerPages:
        """The pages with the new tokens, which come in the format of the pool."""

        def into(pool, new):
            return pool.at[self.layer, self.page, self.offset].set(new.swapaxes(1, 2).astype(pool.dtype))

        keys, values = jax.tree.map(into, (self.keys, self.values), (k_BxGxTxK, v_BxGxTxK))
        return replace(self, keys=keys, values=values)

    def read(self, pages_N: jax.Array) -> tuple[KVArray, KVArray]:
        """Keys and values of N pages, one after the other: ``[1, G, N * slots, K]`` each."""

        def of_pages(pool):
            x = pool[self.layer, pages_N]
            return x.reshape(-1, *x.shape[2:]).swapaxes(0, 1)[None]

        return jax.tree.map(of_pages, (self.keys, self.values))


def attend_pages(
    q_BxTxHxK: jax.Array, past: LayerPages, mask_spec: MaskSpec, bias_BxHxTxS: jax.Array | None = None, *, scale: float,
    cap: float = 0.0, sinks_H: jax.Array | None = None,
) -> jax.Array:
    """``nn.attention.layer.attend`` over the pages of each row, causal: ``[B, T, H, K]``.

    A row reads a few pages at a time and adds them to an online softmax (arXiv:1805.02867). It reads no page after its
    last one and, in layers with a window, none before the window. Only these pages are copied out of the pool. On CPU
    the rows take turns, so that each reads only its own pages; elsewhere they run together.
    """
    attend = partial(_attend_rows, q_BxTxHxK, past, mask_spec, bias_BxHxTxS, sinks_H, scale, cap)
    return jax.lax.platform_dependent(cpu=partial(attend, one_by_one=True), default=partial(attend, one_by_one=False))


def _attend_rows(
    q_BxTxHxK, past: LayerPages, mask_spec: MaskSpec, bias_BxHxTxS, sinks_H, scale: float, cap: float, *,
    one_by_one: bool,
) -> jax.Array:
    T, H, K = q_BxTxHxK.shape[1:]
    _, _, size, G, _ = past.keys.shape
    pages = 1 if one_by_one and T == 1 else max(1, _SPAN // size)  # read at a time
    span = pages * size  # slots read at a time
    missing = -past.table.shape[1] % pages
    table_BxP = jnp.pad(past.table, ((0, 0), (0, missing)))

    def attend_row(xs):
        q_TxHxK, slots_T, table_P, end, bias_HxTxS = xs
        q_1xGxQxK = (q_TxHxK * scale).reshape(T, G, H // G, K).transpose(1, 2, 0, 3).reshape(1, G, -1, K)
        if bias_HxTxS is not None:
            bias_HxTxS = jnp.pad(bias_HxTxS, ((0, 0), (0, 0), (0, missing * size)))

        def attend_span(i, sums):
            k_1xGxSxK, v_1xGxSxK = past.read(jax.lax.dynamic_slice_in_dim(table_P, i * pages, pages))
            logits_HxTxS = softcap(query_key_scores(q_1xGxQxK, k_1xGxSxK).reshape(H, T, -1), cap)
            slots_S = i * span + jnp.arange(span)
            if bias_HxTxS is not None:
                logits_HxTxS += jax.lax.dynamic_slice_in_dim(bias_HxTxS, i * span, span, axis=2)
            mask_1xTxS = causal_mask(slots_T[None], slots_S[None])
            if mask_spec.window is not None:
                mask_1xTxS &= window_mask(slots_T[None], slots_S[None], mask_spec.window)
            logits_HxTxS = jnp.where(mask_1xTxS, logits_HxTxS, MASKED_LOGIT)

            def mix(weights_HxTxS):
                weights_1xGxQxS = weights_HxTxS.reshape(1, G, -1, span)
                return weighted_values(weights_1xGxQxS, v_1xGxSxK, q_TxHxK.dtype).reshape(H, T, K)

            return online_softmax_update(*sums, logits_HxTxS, mix)

        # A masked key counts as MASKED_LOGIT. The first key that is not masked reduces the weight of those before to 0.
        first = 0 if mask_spec.window is None else jnp.where(
            mask_spec.window > 0, jnp.maximum(slots_T[0] - mask_spec.window + 1, 0) // span, 0
        )
        sums = (jnp.full((H, T), MASKED_LOGIT), jnp.zeros((H, T)), jnp.zeros((H, T, K)))
        sums = jax.lax.fori_loop(first, -(-end // span), attend_span, sums)
        _, total_HxT, out_HxTxK = add_sinks(*sums, None if sinks_H is None else sinks_H[:, None])
        out_HxTxK = out_HxTxK / jnp.where(total_HxT > 0, total_HxT, 1)[..., None]
        return out_HxTxK.transpose(1, 0, 2).astype(q_TxHxK.dtype)

    xs = (q_BxTxHxK, mask_spec.slots_q, table_BxP, past.end, bias_BxHxTxS)
    return jax.lax.map(attend_row, xs) if one_by_one else jax.vmap(attend_row)(xs)
