"""Forward passes of timm's transformer blocks that their own forward does not offer: with the CLS
query's attention beside it, for the CLS row alone, or keeping less for the backward pass.

B images, N rows, row 0 the CLS token where a function speaks of it, C width, H heads of d.
"""

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, Mlp, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from aclip.config.sections import Recompute
from aclip.kernels.cls_attention_scores import cls_attention_scores
from aclip.models.one_query_attention import one_query_attention
from aclip.models.recompute import applied

AnyBlock = Block | EvaBlock
AnyAttention = Attention | AttentionRope | EvaAttention


def full_block(
    recompute: Recompute,
    block: AnyBlock,
    x: Tensor,
    rope: Tensor | None = None,
    scores: Tensor | None = None,
    weight: float = 0.0,
) -> Tensor:
    """A transformer block's output, equal to `block(x)` or `block(x, rope)`.

    Args:
        recompute: what the backward pass computes again inside the block.
        block: a timm Block or EvaBlock.
        x: (B, N, C).
        rope: rotary positions of the patches, as RotaryPositions.of_block gives them.
        scores: (B, N - 1) fp32, receives `weight` x the head-mean CLS attention, in place.

    Returns:
        (B, N, C).
    """
    attn = block.attn
    with applied(recompute, block.norm1, x) as normed:
        q, k, v = _queries_keys_values(attn, normed)
    q, k = _turn(attn, attn.q_norm(q), rope), _turn(attn, attn.k_norm(k), rope)
    if scores is not None:
        cls_attention_scores(q[:, :, 0], k.transpose(1, 2), scores, weight)
    x = x + _scaled(block, 1, _project(attn, _attend(attn, q, k, v)))
    return x + _scaled(block, 2, _mlp(recompute, block, x))


def cls_only_block(
    recompute: Recompute,
    block: AnyBlock,
    x: Tensor,
    rope: Tensor | None = None,
    scores: Tensor | None = None,
    weight: float = 0.0,
) -> Tensor:
    """The CLS row of a transformer block's output: (B, 1, C), equal to `block(x)[:, :1]`.

    Arguments are those of `full_block`.
    """
    attn = block.attn
    # Dropped attention does not add up to one, and keys that are normalised or turned are not
    # linear in x.
    linear = isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)
    linear = linear and rope is None and type(attn) is Attention
    with applied(recompute, block.norm1, x) as normed:
        if linear and not (attn.training and attn.attn_drop.p):
            out, attention = _cls_attention_on_input(attn, normed)
            if scores is not None:
                scores.add_(attention.detach().mean(1)[:, 1:], alpha=weight)
        else:
            q, k, v = _cls_query_keys_values(attn, normed)
            q, k = attn.q_norm(q), _turn(attn, attn.k_norm(k), rope)  # the CLS token is not turned
            if scores is not None:
                cls_attention_scores(q[:, :, 0], k.transpose(1, 2), scores, weight)
            out = _attend(attn, q, k, v)
    cls = x[:, :1] + _scaled(block, 1, _project(attn, out))
    return cls + _scaled(block, 2, _mlp(recompute, block, cls))


def read_outside(block: AnyBlock, cls_only: bool) -> list[nn.Parameter | None]:
    """Parameters of a block that these functions read outside the call of the module that owns
    them, for ZeRO-3.

    Args:
        cls_only: whether the block runs for the CLS row alone.
    """
    parameters = []
    if isinstance(block, EvaBlock):
        parameters += [block.gamma_1, block.gamma_2]
        parameters += [getattr(block.attn, name, None) for name in ("q_bias", "v_bias")]
    if cls_only and block.attn.qkv is not None:
        parameters += [block.attn.qkv.weight, block.attn.qkv.bias]
    return parameters


def _queries_keys_values(attn: AnyAttention, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """normed (B, N, C) -> queries, keys and values (B, H, N, d), before norms and positions."""
    if attn.qkv is None:
        linears = (attn.q_proj, attn.k_proj, attn.v_proj)
        return tuple(_split_heads(linear(normed), attn, 1)[0] for linear in linears)
    qkv, bias = attn.qkv(normed), _separate_bias(attn)
    return _split_heads(qkv if bias is None else qkv + bias, attn, 3)


def _cls_query_keys_values(attn: AnyAttention, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """normed (B, N, C) -> query (B, H, 1, d) of the CLS row, keys and values (B, H, N, d), before
    norms and positions."""
    if attn.qkv is None:
        parts = attn.q_proj(normed[:, :1]), attn.k_proj(normed), attn.v_proj(normed)
        return tuple(_split_heads(part, attn, 1)[0] for part in parts)
    bias = attn.qkv.bias if attn.qkv.bias is not None else _separate_bias(attn)
    dim = attn.num_heads * attn.head_dim
    q_weight, kv_weight = attn.qkv.weight.split([dim, 2 * dim])
    q_bias, kv_bias = (None, None) if bias is None else bias.split([dim, 2 * dim])
    (q,) = _split_heads(F.linear(normed[:, :1], q_weight, q_bias), attn, 1)
    k, v = _split_heads(F.linear(normed, kv_weight, kv_bias), attn, 2)
    return q, k, v


def _separate_bias(attn: AnyAttention) -> Tensor | None:
    """The bias of queries, keys and values that EVA's attention keeps beside its linear."""
    if getattr(attn, "q_bias", None) is None:
        return None
    return torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])


def _cls_attention_on_input(attn: Attention, normed: Tensor) -> tuple[Tensor, Tensor]:
    """normed (B, N, C) -> the CLS row's heads (B, 1, H * d), its attention (B, H, N) fp32."""
    q_weight, k_weight, v_weight = attn.qkv.weight.chunk(3)
    q_bias, _, v_bias = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    q = F.linear(normed[:, 0], q_weight, q_bias).unflatten(1, (attn.num_heads, -1))
    out, attention = one_query_attention(q, normed, k_weight, v_weight, v_bias)
    return out.unsqueeze(1), attention


def _split_heads(x: Tensor, attn: AnyAttention, parts: int) -> tuple[Tensor, ...]:
    """(B, N, parts * H * d) to `parts` tensors (B, H, N, d), strided views."""
    heads = x.view(x.shape[0], x.shape[1], parts, attn.num_heads, attn.head_dim)
    # Transposed part by part: the gradient of one permuted tensor would be copied twice.
    return tuple(part.transpose(1, 2) for part in heads.unbind(2))


def _turn(attn: AnyAttention, part: Tensor, rope: Tensor | None) -> Tensor:
    """Queries or keys (B, H, N, d) with those of patches turned by their rotary positions."""
    if rope is None:
        return part
    prefix, patches = part.tensor_split([attn.num_prefix_tokens], dim=2)
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attn.rotate_half)], dim=2)


def _attend(attn: AnyAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # (B, H, n, d)
    return out.transpose(1, 2).flatten(2)


def _project(attn: AnyAttention, heads: Tensor) -> Tensor:
    return attn.proj_drop(attn.proj(attn.norm(heads)))


def _scaled(block: AnyBlock, number: int, branch: Tensor) -> Tensor:
    """What a block adds for its first or second half: scaled, and dropped at random in training."""
    if isinstance(block, EvaBlock):
        gamma = getattr(block, f"gamma_{number}")
        branch = branch if gamma is None else gamma * branch
    else:
        branch = getattr(block, f"ls{number}")(branch)
    return getattr(block, f"drop_path{number}")(branch)


def _mlp(recompute: Recompute, block: AnyBlock, x: Tensor) -> Tensor:
    """The second half of a block without its residual: (B, n, C) -> (B, n, C)."""
    mlp = block.mlp
    if type(mlp) is not Mlp:
        return mlp(block.norm2(x))
    with applied(recompute, block.norm2, x) as normed:
        hidden = mlp.fc1(normed)
    with applied(recompute, mlp.act, hidden) as activated:
        return mlp.drop2(mlp.fc2(mlp.norm(mlp.drop1(activated))))
