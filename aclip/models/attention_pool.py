"""timm's attention pool, whose single query needs no keys and values of its own."""

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from aclip.models.one_query_attention import one_query_attention


def attention_pool(pool: AttentionPoolLatent, x: Tensor) -> tuple[Tensor, Tensor]:
    """The pooled rows, equal to `pool(x)`, and the attention of the pool's query to them.

    Args:
        pool: a pool of timm's VisionTransformer or Eva.
        x: (M, N, C).

    Returns:
        (M, C), and (M, H, N) fp32.
    """
    query = pool.q(pool.latent[:, 0]).view(1, pool.num_heads, -1).expand(len(x), -1, -1)
    k_weight, v_weight = pool.kv.weight.chunk(2)
    v_bias = None if pool.kv.bias is None else pool.kv.bias.chunk(2)[1]
    heads, attention = one_query_attention(query, x, k_weight, v_weight, v_bias)
    out = pool.proj_drop(pool.proj(heads))
    return out + pool.mlp(pool.norm(out)), attention


def read_outside(pool: AttentionPoolLatent) -> list[nn.Parameter | None]:
    """Parameters of a pool that `attention_pool` reads outside the call of their modules."""
    return [pool.latent, pool.kv.weight, pool.kv.bias]
