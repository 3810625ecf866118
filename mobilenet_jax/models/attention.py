"""Attention between the pixels of maps: many query heads share one key and one value."""

import jax
import jax.numpy as jnp


def attend(query: jax.Array, key: jax.Array, value: jax.Array, *, heads: int) -> jax.Array:
    """Compute multi-query attention (1911.02150 sec. 3), with the softmax in float32.

    Args:
      query: [B, H, W, heads * C], with the channels of each head together.
      key: [B, h, w, C]; h and w may differ from the query's.
      value: [B, h, w, D].
      heads: the number of heads of the query.

    Returns:
      [B, H, W, heads * D], with the channels of each head together.
    """
    batch, height, width, _ = query.shape
    size = key.shape[-1]
    queries = query.reshape(batch, height * width, heads, size)
    keys, values = (x.reshape(batch, -1, x.shape[-1]) for x in (key, value))
    scores = jnp.einsum(
        "bnhc,bmc->bhnm", queries, keys, preferred_element_type=jnp.promote_types(key.dtype, jnp.float32)
    )
    shares = jax.nn.softmax(scores * size**-0.5, axis=-1).astype(value.dtype)
    return jnp.einsum("bhnm,bmd->bnhd", shares, values).reshape(batch, height, width, -1)
