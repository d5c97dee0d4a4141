"""Colour augmentation and normalisation of uint8 views, batched, with parameters per view."""

from aclip.kernels.augment_views.op import augment_views
from aclip.kernels.augment_views.reference import AUGMENT_PARAMS, augment_views_reference

__all__ = ["AUGMENT_PARAMS", "augment_views", "augment_views_reference"]
