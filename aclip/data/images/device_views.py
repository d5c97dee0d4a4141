"""The views that are cut on the device from a batch's whole images."""

import torch
from torch import Tensor

from aclip.data.images.whole_images import WholeImages
from aclip.kernels.cut_views import cut_views


def cut_views_on_device(
    whole: WholeImages,
    student_boxes: Tensor,
    teacher_box: Tensor | None,
    resolution: int,
    teacher_resolution: int | None,
) -> dict[str, Tensor | None]:
    """Cuts a batch's views on the device where its images lie, each kind in one launch.

    Args:
        whole: B images, on any device.
        student_boxes: (B, V, 4) int32, in pixels of the images before they were reduced; on the
            images' device.
        teacher_box: (B, 4) int32, likewise; None if there is no teacher view.
        resolution: R, the side of a student view and of a view for SimCLR in pixels.
        teacher_resolution: T, the side of a teacher view in pixels.

    Returns:
        student_views (B, V, 3, R, R), teacher_view (B, 3, T, T) or None, ssl_views (B, S, 3, R, R)
        or None; uint8, each within 1 level of what views.crop gives for an image not reduced.
    """
    places = _places(whole)

    def cut(boxes: Tensor, flips: Tensor | None, side: int) -> Tensor:
        return cut_views(whole.pixels, places, boxes, flips, side)

    views = {"student_views": cut(student_boxes, None, resolution)}
    views |= {"teacher_view": None, "ssl_views": None}
    if teacher_box is not None:
        teacher_view = cut(teacher_box.unsqueeze(1), None, teacher_resolution)
        views["teacher_view"] = teacher_view.squeeze(1)
    if whole.ssl_boxes is not None:
        views["ssl_views"] = cut(whole.ssl_boxes, whole.ssl_flips, resolution)
    return views


def _places(whole: WholeImages) -> Tensor:
    """(B, 4) int64 with the columns PLACES of cut_views, on the images' device."""
    sizes = whole.sizes.long()
    first = whole.ends - sizes[:, 0] * sizes[:, 1]
    places = torch.cat([sizes, first.unsqueeze(1)], dim=1)
    device = whole.pixels.device
    if device.type == "cuda":
        places = places.pin_memory()
    return places.to(device, non_blocking=True)
