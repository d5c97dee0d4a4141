"""Modules that terms share: heads with BatchNorm over all ranks, and learned numbers."""

import math

import torch
from torch import Tensor, nn

from aclip.distributed import sum_with_grad, world_size


class GlobalBatchNorm(nn.Module):
    """BatchNorm over the rows of all ranks, fp32 statistics, always those of the batch.

    The heads exist only during training, so no running statistics are kept. torch's SyncBatchNorm
    refuses CPU tensors and breaks when DeepSpeed casts the parameters to bf16.
    """

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, width), the same n on every rank; returns the same shape and dtype."""
        rows = x.float()
        count = len(rows) * world_size()
        # Two passes: the deviations are exact where sum(x^2) - sum(x)^2 would cancel.
        mean = sum_with_grad(rows.sum(0)) / count
        centred = rows - mean
        variance = sum_with_grad(centred.square().sum(0)) / count
        normed = centred * torch.rsqrt(variance + self.eps)
        return (normed * self.weight.float() + self.bias.float()).to(x.dtype)


def mlp_head(widths: list[int]) -> nn.Sequential:
    """Linear, BatchNorm, ReLU between the widths; the last layer is linear alone. No biases: one in
    front of a BatchNorm has no gradient but rounding noise, which Adam would blow up to full steps.

    Source: the heads of MoCo v3 and SLIP; method of A-CLIP, arXiv:2212.08653.
    """
    layers: list[nn.Module] = []
    for width, next_width in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(width, next_width, bias=False), GlobalBatchNorm(next_width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=False))


class ExactScalar(nn.Module):
    """A learned number, stored as a parameter of shape (1,), whose forward pass is exact in bf16.

    Near 100 the bf16 step of a logit scale's logarithm is 3 % of the scale, so what is computed
    uses the fp32 value that `exact` holds, while the gradient goes to the parameter. The stepper
    sets `exact` after each update.

    Args:
        parameter_name: how checkpoints call the parameter.
        initial: what it starts at.
        ceiling: what the fp32 master is clamped to after each update.

    Attributes:
        exact: (1,) fp32, the master's value; None outside of a run, where the parameter counts.
    """

    def __init__(self, parameter_name: str, initial: float, ceiling: float = math.inf):
        super().__init__()
        self.parameter_name = parameter_name
        self.ceiling = ceiling
        self.register_parameter(parameter_name, nn.Parameter(torch.full((1,), float(initial))))
        self.exact: Tensor | None = None

    def forward(self) -> Tensor:
        """The number, (1,) fp32."""
        value = getattr(self, self.parameter_name).float()
        if self.exact is not None:
            value = value + (self.exact.to(value.device) - value).detach()
        return value


class LogitScale(ExactScalar):
    """The learned inverse temperature of the losses that compare images and captions; stored as
    its logarithm.

    Args:
        initial, ceiling: the scale's own, not those of its logarithm.
    """

    def __init__(self, initial: float = 1 / 0.07, ceiling: float = 100.0):
        super().__init__("log_logit_scale", math.log(initial), math.log(ceiling))

    def forward(self) -> Tensor:
        """The scale itself, (1,) fp32."""
        return super().forward().exp()
