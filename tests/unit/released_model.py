"""A model with the names and files of SLIP, built of torch's and timm's own parts."""

import argparse

import timm
import torch
from torch import nn

CONTEXT, VOCABULARY = 77, 49408
DEMO_KWARGS = {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
DEMO = ("vit_tiny_patch16_224", {**DEMO_KWARGS, "img_size": 64}, 96, 3, 2, 96)
SMALL = ("vit_small_patch16_224", {"num_heads": 12, "depth": 2}, 512, 8, 1, 512)


class TextBlock(nn.Module):
    """A block of CLIP's text transformer, of torch's own parts."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x):
        future = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, attn_mask=future, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))


class ReleasedModel(nn.Module):
    """CLIP with the names of SLIP's checkpoints: a timm ViT and the text transformer."""

    def __init__(self, timm_name, timm_kwargs, width, heads, layers, embed_dim):
        super().__init__()
        self.visual = timm.create_model(timm_name, num_classes=0, **timm_kwargs)
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.Sequential(*(TextBlock(width, heads) for _ in range(layers)))}
        )
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.positional_embedding = nn.Parameter(torch.zeros(CONTEXT, width))
        self.ln_final = nn.LayerNorm(width)
        image_width = self.visual.embed_dim
        self.image_projection = nn.Parameter(torch.zeros(image_width, embed_dim))
        self.text_projection = nn.Parameter(torch.zeros(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += 0.05 * torch.randn_like(parameter)

    def encode_image(self, pixels):
        return self.visual(pixels) @ self.image_projection

    def encode_text(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer["resblocks"](x))
        return x[torch.arange(len(tokens)), tokens.argmax(1)] @ self.text_projection


def released_model(shape, seed=0):
    torch.manual_seed(seed)
    return ReleasedModel(*shape).eval()


def save_released(path, state):
    """As those projects save: with optimizer, scaler and the command line."""
    content = {
        "epoch": 25,
        "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]},
        "scaler": {"scale": 65536.0},
        "best_acc1": 42.8,
        "args": argparse.Namespace(model="SLIP_VITB16", lr=3e-3, betas=(0.9, 0.98)),
    }
    torch.save(content, path)
    return str(path)


def inputs(side, lengths=(3, 77, 20)):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, side, side, generator=generator)
    tokens = torch.randint(1, 40000, (len(lengths), CONTEXT), generator=generator)
    for row, length in zip(tokens, lengths, strict=True):
        row[0], row[length - 1], row[length:] = 49406, 49407, 0
    return pixels, tokens
