"""SimCLR between two views of an image."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from aclip.distributed import gather_with_grad, rank
from aclip.method.losses.heads import mlp_head
from aclip.method.losses.term import LossTerm, StudentOutput, TermPart, by_view
from aclip.section import Section, Weight, Width


class Keys(Section):
    simclr: Weight = 1.0
    """Weight of SimCLR between two views of an image; see views.ssl."""
    simclr_temperature: float = Field(0.1, gt=0)
    simclr_widths: tuple[Width, Width, Width] = (4096, 4096, 256)
    """Hidden, hidden and output width of the SimCLR head."""


class Simclr(LossTerm):
    name, keys, trains = "simclr", Keys, ("image",)
    reads_ssl_views = True

    def __init__(self, recipe):
        super().__init__(recipe)
        self.widths = recipe.loss.simclr_widths
        self.temperature = recipe.loss.simclr_temperature

    @classmethod
    def check(cls, recipe) -> None:
        if 2 not in (recipe.views.student, recipe.views.ssl):
            raise ValueError(
                f"loss.simclr is {recipe.loss.simclr:g} with views.student {recipe.views.student} "
                "and views.ssl 0, but it compares two views; set one of them to 2 "
                "or loss.simclr to 0"
            )

    def parts(self, student: nn.Module) -> dict[str, TermPart]:
        return {"simclr_head": TermPart(mlp_head([student.image.width, *self.widths]))}

    def project(self, student: nn.Module, features: dict[str, Tensor]) -> Tensor:
        """(B, 2, D) from the SSL views where there are any, else from the student views."""
        return by_view(student.simclr_head, features.get("ssl", features["image"]))

    def loss(self, output: StudentOutput, target: None) -> Tensor:
        return simclr(output.heads[self.name], self.temperature)


def simclr(embeds: Tensor, temperature: float) -> Tensor:
    """NT-Xent between two views: a view's positive is the other view, its negatives all other
    images.

    Args:
        embeds: (B, 2, D) float, unnormalised head outputs.
        temperature: divides the cosine similarities.

    Returns:
        Scalar fp32, mean over both views.

    Source: SimCLR, arXiv:2002.05709, as used by SLIP, arXiv:2112.12750.
    """
    first, second = F.normalize(embeds.float(), dim=-1).unbind(1)  # (B, D) each
    all_embeds = gather_with_grad(torch.stack([first, second], dim=1))
    all_first, all_second = all_embeds.unbind(1)  # (N, D) each
    # The columns of the gathered batch that hold this rank's rows.
    labels = torch.arange(len(first), device=first.device) + rank() * len(first)
    columns = torch.arange(len(all_first), device=first.device)
    itself = labels.unsqueeze(1) == columns  # (B, N)

    def one_side(query: Tensor, same_view: Tensor, other_view: Tensor) -> Tensor:
        across = query @ other_view.T / temperature
        within = (query @ same_view.T / temperature).masked_fill(itself, float("-inf"))
        return F.cross_entropy(torch.cat([across, within], dim=1), labels)

    return (one_side(first, all_first, all_second) + one_side(second, all_second, all_first)) / 2
