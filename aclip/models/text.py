"""The text tower: transformers' CLIP text model, driven by our own forward.

Only real tokens are computed: linears, norms and embeddings run on the captions' tokens packed
behind each other, attention alone on padded rows. That is exact, since the mask is causal and the
feature is read at the end token: what stands behind it changes nothing. The last layer computes the
end token's row alone. B captions, L tokens of the longest, T real tokens of all, H heads, W width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from aclip.config.sections import Recompute, TextTowerConfig
from aclip.method.tokens import END_ID, START_ID, VOCAB_SIZE, Tokens
from aclip.models.folder_text import FolderTextTower
from aclip.models.one_query_attention import one_query_attention
from aclip.models.packing import Packing, packing_of
from aclip.models.recompute import applied, run_block

QUICK_GELU = 1.702


class TextTower(nn.Module):
    """Captions to features at the end token.

    A text tower of another kind offers what is public here: `width`, `num_heads`,
    `context_length`, `blocks`, `identity`, `external_parameters`, `forward` and, for masked
    language modelling, `forward_tokens`. It reads Tokens and decides where in them its feature
    lies. Whether it starts from weights of its own is its `pretrained`.

    Args:
        width, heads, layers: the size of the transformer.
        context_length: the most tokens of a caption.
        recompute: what the backward pass computes again (aclip/models/recompute.py).
        compile: whether torch.compile compiles each kind of layer, on its first call.
    """

    pretrained = False

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        context_length: int,
        recompute: Recompute = "none",
        compile: bool = False,
    ):
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            max_position_embeddings=context_length,
            hidden_act="quick_gelu",
            bos_token_id=START_ID,
            eos_token_id=END_ID,
            pad_token_id=0,
            attn_implementation="sdpa",
        )
        self.width = width
        self.num_heads = heads
        self.context_length = context_length
        # Settings that change the features but no weight, by which class features are cached.
        self.identity = f"{heads} {context_length}"
        self.recompute = recompute
        # Each batch has its own number of tokens, so sizes must not be compiled in.
        self._packed_layer, self._end_only_layer = (
            torch.compile(layer, dynamic=True) if compile else layer
            for layer in (_packed_layer, _end_only_layer)
        )
        self.transformer = CLIPTextModel(config)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer's layers, from the input on."""
        return list(self.transformer.encoder.layers)

    def external_parameters(self) -> list[nn.Parameter]:
        """Parameters that are read outside the call of the module that owns them (for ZeRO-3)."""
        attn = self.transformer.encoder.layers[-1].self_attn
        return [attn.k_proj.weight, attn.k_proj.bias, attn.v_proj.weight, attn.v_proj.bias]

    def forward(self, tokens: Tokens) -> Tensor:
        """Encodes captions to (B, W), the normalised feature at the end token.

        On a GPU, tokens that are not `located` make the step wait for the device.
        """
        packing = packing_of(tokens)
        x = self._embed(tokens, packing)
        *layers, last = self.transformer.encoder.layers
        for layer in layers:
            x = self._run(self._packed_layer, layer, x, packing)
        x = self._run(self._end_only_layer, last, x, packing, tokens.ends)
        return self.transformer.final_layer_norm(x)

    def forward_tokens(
        self, tokens: Tokens, masked: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """Encodes captions to the features of all their tokens.

        Args:
            tokens: the captions, as `forward` takes them.
            masked: (B, L) bool, tokens whose embedding is replaced.
            mask_token: (W,), what it is replaced by; the position is added to it too.

        Returns:
            (B, L, W), normalised; zero at padding.
        """
        packing = packing_of(tokens)
        x = self._embed(tokens, packing, masked, mask_token)
        for layer in self.transformer.encoder.layers:
            x = self._run(self._packed_layer, layer, x, packing)
        return packing.pad(self.transformer.final_layer_norm(x))

    def _embed(
        self,
        tokens: Tokens,
        packing: Packing,
        masked: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        embeddings, real_ids = self.transformer.embeddings, packing.real_ids
        x = embeddings.token_embedding(tokens.ids.flatten().index_select(0, real_ids))
        if masked is not None:
            masked = masked.flatten().index_select(0, real_ids).unsqueeze(1)
            x = torch.where(masked, mask_token.to(x.dtype), x)
        return x + embeddings.position_embedding(real_ids % tokens.ids.shape[1])

    def _run(self, function: Callable, *args) -> Tensor:
        # Once for run_block, which may recompute the whole layer, and once for the layer itself.
        return run_block(self.recompute, function, self.recompute, *args)


def build_text_tower(config: TextTowerConfig, compile: bool = False) -> TextTower | FolderTextTower:
    """The text tower that a recipe asks for; data.tokenizer.build_tokenizer gives its tokenizer."""
    if config.name:
        return FolderTextTower(config)
    of_folders = {"name", "pretrained", "pooling"}
    return TextTower(**config.model_dump(exclude=of_folders), compile=compile)


def _packed_layer(
    recompute: Recompute, layer: CLIPEncoderLayer, x: Tensor, packing: Packing
) -> Tensor:
    """A whole layer on packed tokens: (T, W) -> (T, W)."""
    attn = layer.self_attn
    with applied(recompute, layer.layer_norm1, x) as normed:
        qkv = [linear(normed) for linear in (attn.q_proj, attn.k_proj, attn.v_proj)]
    heads = packing.pad(torch.cat(qkv, 1)).unflatten(2, (3, attn.num_heads, -1))
    q, k, v = (part.transpose(1, 2) for part in heads.unbind(2))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, L, d)
    x = x + attn.out_proj(packing.pack(out.transpose(1, 2).flatten(2)))
    return x + _mlp(recompute, layer, x)


def _end_only_layer(
    recompute: Recompute,
    layer: CLIPEncoderLayer,
    x: Tensor,
    packing: Packing,
    end_columns: Tensor,
) -> Tensor:
    """The end tokens' rows of a layer's output: (T, W) -> (B, W)."""
    attn = layer.self_attn
    ends = (end_columns + 1).cumsum(0) - 1  # among the packed tokens
    normed = layer.layer_norm1(x)
    q = attn.q_proj(normed.index_select(0, ends)).unflatten(1, (attn.num_heads, -1))
    columns = torch.arange(packing.shape[1], device=x.device)
    out, _ = one_query_attention(
        q,
        packing.pad(normed),
        attn.k_proj.weight,
        attn.v_proj.weight,
        attn.v_proj.bias,
        keep=columns <= end_columns.unsqueeze(1),
    )
    # The key's bias gets its gradient of zero, because ZeRO-3 wants one of every parameter.
    out = out + 0 * attn.k_proj.bias
    x = x.index_select(0, ends) + attn.out_proj(out)
    return x + _mlp(recompute, layer, x)


def _mlp(recompute: Recompute, layer: CLIPEncoderLayer, x: Tensor) -> Tensor:
    with applied(recompute, layer.layer_norm2, x) as normed:
        # QuickGELU, x * sigmoid(1.702 x), as silu: autograd keeps one tensor of it instead of two.
        hidden = layer.mlp.fc1(normed) * QUICK_GELU
    with applied(recompute, _quick_gelu_of_scaled, hidden) as activated:
        return layer.mlp.fc2(activated)


def _quick_gelu_of_scaled(x: Tensor) -> Tensor:
    return F.silu(x) / QUICK_GELU
