"""The text tower: transformers' CLIP text model, built from a config.

The mask is causal and the feature is read at the end token, so tokens behind it change nothing: the
batch arrives cut to its longest caption (data/batch.py).
"""

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

VOCAB_SIZE = 49408
START_TOKEN, END_TOKEN = 49406, 49407


class TextTower(nn.Module):
    """Captions to features at the end token.

    Args:
        width, heads, layers: of the transformer.
        context_length: the longest caption, tokens.
        checkpoint_activations: recompute each block in the backward pass.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        context_length: int,
        checkpoint_activations: bool = False,
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
            bos_token_id=START_TOKEN,
            eos_token_id=END_TOKEN,
            pad_token_id=0,
            attn_implementation="sdpa",
        )
        self.width = width
        self.transformer = CLIPTextModel(config)
        if checkpoint_activations:
            self.transformer.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, tokens: Tensor) -> Tensor:
        """Encodes captions.

        Args:
            tokens: (B, L) int64, start token first, end token last, zeros behind it.

        Returns:
            (B, width), the normalised feature at the end token.
        """
        return self.transformer(input_ids=tokens).pooler_output
