"""Reading a text again while it is decoded, where a longer text is rotated otherwise from its first token on.

With the scalings "dynamic" and "longrope" the rotations of all tokens depend on the length of the text, and through
attention so does everything that later layers computed for them. Cached keys and values of a shorter text are then not
those of the longer one, whether they are stored rotated or not. ``transformers`` drops the cache of Phi-3 where a text
grows beyond the original context, and reads the text anew; so does this, within the compiled program. Under "longrope"
that happens once in a text. Under "dynamic" it happens at every token beyond the context of the model.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm.nn.attention.kv_cache import Cache
from jaxlm.nn.positions import rotary_length
from jaxlm.nn.stack import C, Stack

__all__ = ["read_again"]


def read_again(stack: Stack, to_input: Callable[[jax.Array], jax.Array], tokens_RxT: jax.Array, cache: C) -> C:
    """The cache before these tokens are appended, as it would be if the whole text had been read at once with them.

    A cache in pages is left as it is: whoever assigns the pages sees to it (``inference.engine.scheduler``).

    Args:
        stack: the decoder.
        to_input: from tokens to the input of the stack.
        tokens_RxT: the next tokens of every row.
        cache: of a text that the stack has read so far.
    """
    if not stack.config.rotates_by_length or not isinstance(cache, Cache):
        return cache
    cache = cache.append_text(tokens_RxT)
    length_B = rotary_length(cache.index + tokens_RxT.shape[1] - cache.start, stack.config).astype(jnp.int32)

    def read(cache: Cache) -> Cache:
        text_RxS, begin = cache.text(), cache.at_start(length_B)
        return stack.decode(to_input(text_RxS), begin)[1].replace(index=cache.index)

    # A loop of one iteration at most: unlike a conditional, it works on the cache in place.
    cache = jax.lax.while_loop(lambda cache: (cache.index > 0) & jnp.any(cache.rotary_length != length_B), read, cache)
    return cache.replace(rotary_length=length_B)
