"""Attention scores and boxes in, the packed input of the student's ViT out."""

from aclip.kernels.attentive_pack.op import attentive_pack
from aclip.kernels.attentive_pack.reference import attentive_pack_reference, block_scores

__all__ = ["attentive_pack", "attentive_pack_reference", "block_scores"]
