"""SigLIP's loss over the global batch without its B x B logits."""

from aclip.kernels.sigmoid_loss.op import sigmoid_loss
from aclip.kernels.sigmoid_loss.reference import sigmoid_loss_reference

__all__ = ["sigmoid_loss", "sigmoid_loss_reference"]
