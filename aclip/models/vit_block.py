"""Forward passes of timm's transformer block that its own forward does not offer: with the CLS
query's attention beside it, for the CLS row alone, or keeping less for the backward pass.

B images, N tokens, row 0 the CLS token, C width, H heads of d.
"""

import torch.nn.functional as F
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from aclip.config.sections import Recompute
from aclip.kernels.cls_attention_scores import cls_attention_scores
from aclip.models.one_query_attention import one_query_attention
from aclip.models.recompute import applied


def full_block(
    recompute: Recompute,
    block: Block,
    x: Tensor,
    scores: Tensor | None = None,
    weight: float = 0.0,
) -> Tensor:
    """A transformer block's output, equal to `block(x)`.

    Args:
        recompute: what the backward pass computes again inside the block.
        block: a timm Block.
        x: (B, N, C).
        scores: (B, N - 1) fp32, receives `weight` x the head-mean CLS attention, in place.

    Returns:
        (B, N, C).
    """
    attn = block.attn
    with applied(recompute, block.norm1, x) as normed:
        q, k, v = _split_heads(attn.qkv(normed), attn, 3)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if scores is not None:
        cls_attention_scores(q[:, :, 0], k.transpose(1, 2), scores, weight)
    x = x + block.drop_path1(block.ls1(_project(attn, _attend(attn, q, k, v))))
    return x + block.drop_path2(block.ls2(_mlp(recompute, block, x)))


def cls_only_block(
    recompute: Recompute,
    block: Block,
    x: Tensor,
    scores: Tensor | None = None,
    weight: float = 0.0,
) -> Tensor:
    """The CLS row of a transformer block's output: (B, 1, C), equal to `block(x)[:, :1]`.

    Arguments are those of `full_block`.
    """
    attn = block.attn
    # Dropped attention does not add up to one, and normalised keys are not linear in x.
    linear = isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)
    with applied(recompute, block.norm1, x) as normed:
        if linear and not (attn.training and attn.attn_drop.p):
            out, attention = _cls_attention_on_input(attn, normed)
            if scores is not None:
                scores.add_(attention.detach().mean(1)[:, 1:], alpha=weight)
        else:
            q, k, v = _cls_query_keys_values(attn, normed)
            if scores is not None:
                cls_attention_scores(q[:, :, 0], k.transpose(1, 2), scores, weight)
            out = _attend(attn, q, k, v)
    cls = x[:, :1] + block.drop_path1(block.ls1(_project(attn, out)))
    return cls + block.drop_path2(block.ls2(_mlp(recompute, block, cls)))


def _cls_attention_on_input(attn: Attention, normed: Tensor) -> tuple[Tensor, Tensor]:
    """normed (B, N, C) -> the CLS row's heads (B, 1, H * d), its attention (B, H, N) fp32."""
    q_weight, k_weight, v_weight = attn.qkv.weight.chunk(3)
    q_bias, _, v_bias = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    q = F.linear(normed[:, 0], q_weight, q_bias).unflatten(1, (attn.num_heads, -1))
    out, attention = one_query_attention(q, normed, k_weight, v_weight, v_bias)
    return out.unsqueeze(1), attention


def _cls_query_keys_values(attn: Attention, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """normed (B, N, C) -> query (B, H, 1, d) of the CLS row, keys and values (B, H, N, d)."""
    dim = attn.attn_dim
    q_weight, kv_weight = attn.qkv.weight.split([dim, 2 * dim])
    q_bias, kv_bias = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split([dim, 2 * dim])
    (q,) = _split_heads(F.linear(normed[:, :1], q_weight, q_bias), attn, 1)
    k, v = _split_heads(F.linear(normed, kv_weight, kv_bias), attn, 2)
    return attn.q_norm(q), attn.k_norm(k), v


def _split_heads(x: Tensor, attn: Attention, parts: int) -> tuple[Tensor, ...]:
    """(B, N, parts * H * d) to `parts` tensors (B, H, N, d), strided views."""
    heads = x.view(x.shape[0], x.shape[1], parts, attn.num_heads, attn.head_dim)
    # Transposed part by part: the gradient of one permuted tensor would be copied twice.
    return tuple(part.transpose(1, 2) for part in heads.unbind(2))


def _attend(attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # (B, H, n, d)
    return out.transpose(1, 2).flatten(2)


def _project(attn: Attention, heads: Tensor) -> Tensor:
    return attn.proj_drop(attn.proj(attn.norm(heads)))


def _mlp(recompute: Recompute, block: Block, x: Tensor) -> Tensor:
    """The second half of a block without its residual: (B, n, C) -> (B, n, C)."""
    mlp = block.mlp
    if type(mlp) is not Mlp:
        return mlp(block.norm2(x))
    with applied(recompute, block.norm2, x) as normed:
        hidden = mlp.fc1(normed)
    with applied(recompute, mlp.act, hidden) as activated:
        return mlp.drop2(mlp.fc2(mlp.norm(mlp.drop1(activated))))
