"""Views cut out of whole images and resampled to one size, as Pillow's BILINEAR does it."""

from aclip.kernels.cut_views.op import cut_views
from aclip.kernels.cut_views.reference import PLACES, cut_views_reference

__all__ = ["PLACES", "cut_views", "cut_views_reference"]
