"""open_clip's own CLIP training step with a recipe's towers: what other steps are compared with."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import CLIP, ClipLoss
from torch import Tensor

from aclip.config.recipe import Recipe
from aclip.data.images.augment import augment
from aclip.data.synthetic import synthetic_batch
from aclip.engine.optimizer import optimizer_bytes, parameter_groups
from aclip.models.vit import ImageTower

CONTEXT_LENGTH = 77


class OpenClipStep:
    """One update of open_clip's CLIP: its model, its loss, AdamW, and its clamp of the logit scale.

    Precision is open_clip's own: fp32 on a CPU, bf16 autocast with fp32 weights on a GPU. Captions
    are padded to the context length, as its tokeniser does.

    Args:
        recipe: gives sizes of the towers, the optimizer and the batch's images and captions.
    """

    def __init__(self, recipe: Recipe, batch_size: int, device: torch.device):
        self._recipe, self._device = recipe, device
        batch = synthetic_batch(recipe, batch_size)
        self._views = batch.student_views[:, 0]
        # One caption of each image, since it knows no others.
        ids = batch.tokens.ids[:: recipe.data.captions_per_image]
        self._tokens = F.pad(ids, (0, CONTEXT_LENGTH - ids.shape[1]))
        if device.type == "cuda":
            self._views, self._tokens = self._views.pin_memory(), self._tokens.pin_memory()
        self._model = CLIP(**open_clip_sizes(recipe)).to(device)
        config = recipe.optimizer
        groups = parameter_groups(self._model, config.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)

    def step(self, patch_dropout: float) -> Tensor:
        """One update with this share of the patches dropped; returns the loss."""
        self._model.visual.patch_dropout.prob = patch_dropout
        pixels = augment(
            self._views.to(self._device, non_blocking=True),
            None,
            self._recipe.augment,
            torch.float32,
        )
        with self._autocast():
            loss = open_clip_loss(
                self._model, pixels, self._tokens.to(self._device, non_blocking=True)
            )
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            self._model.logit_scale.clamp_(0, torch.tensor(100.0).log())
        return loss.detach()

    def state_bytes(self) -> int:
        """Weights and both moments."""
        parameters = list(self._model.parameters())
        return sum(p.nbytes + optimizer_bytes(p.numel(), p.dtype) for p in parameters)

    def _autocast(self):
        if self._device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()


def open_clip_sizes(recipe: Recipe) -> dict[str, Any]:
    """The arguments of open_clip's CLIP for the recipe's towers."""
    with torch.device("meta"):
        vit = ImageTower(**recipe.model.image.model_dump()).vit
    text = recipe.model.text
    return {
        "embed_dim": recipe.model.embed_dim,
        "vision_cfg": {
            "image_size": recipe.model.image.resolution,
            "patch_size": vit.patch_embed.patch_size[0],
            "width": vit.embed_dim,
            "head_width": vit.embed_dim // vit.blocks[0].attn.num_heads,
            "layers": len(vit.blocks),
            # A little dropout builds the module; the caller sets what is dropped.
            "patch_dropout": 0.5,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
        },
        "output_dict": True,
    }


def open_clip_loss(model: CLIP, pixels: Tensor, ids: Tensor) -> Tensor:
    """The loss () of pixels (B, 3, R, R) and captions (B, CONTEXT_LENGTH), on one rank."""
    return ClipLoss()(**model(pixels, ids))
