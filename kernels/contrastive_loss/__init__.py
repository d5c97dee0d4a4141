"""InfoNCE over the global batch without its B x B logits."""

from aclip.kernels.contrastive_loss.op import contrastive_loss
from aclip.kernels.contrastive_loss.reference import contrastive_loss_reference

__all__ = ["contrastive_loss", "contrastive_loss_reference"]
