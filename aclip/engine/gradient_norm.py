"""The norm of a step's whole gradient, without making the host wait for the device.

DeepSpeed's own takes an operation for each parameter and reads three values on the host (0.19.8),
so it is switched off where that is possible (`DsConfig.engine_values`).
"""

import torch
import torch.distributed as dist
from torch import Tensor


def gradient_norm(engine) -> Tensor | None:
    """The norm of the gradient that the next `engine.step` will use, before clipping.

    A collective under ZeRO-1 and 2: every rank calls, after its last backward pass.

    Returns:
        () fp32 on the engine's device, equal on every rank; not finite where the gradient is not.
        None where DeepSpeed finds it in its step, see `found_by_engine`.
    """
    if engine.zero_optimization_stage() == 0:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        return _squares(gradients, engine.device).sqrt()
    if _is_found_in_step(engine):
        return None
    gradients = []
    for group in engine.optimizer.averaged_gradients.values():
        flat = getattr(group, "flat_partition", None)
        gradients += group if flat is None else [flat]
    squares = _squares(gradients, engine.device)
    if dist.get_world_size() > 1:
        dist.all_reduce(squares)
    return squares.sqrt()


def found_by_engine(engine) -> Tensor | None:
    """What DeepSpeed found in its last step, as `gradient_norm` gives it; None if it did not look.

    Where its check of overflows is on and finds one, it has skipped the update.
    """
    if engine.zero_optimization_stage() == 0 or not _is_found_in_step(engine):
        return None
    norm = engine.get_global_grad_norm()
    if norm is not None and not torch.is_tensor(norm):
        norm = torch.full((), norm, device=engine.device)
    return None if norm is None else norm.to(engine.device)


def _is_found_in_step(engine) -> bool:
    return engine.zero_optimization_stage() == 3 or engine.zero_compute_grad_norm()


def _squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The sum of the squares of all elements, () fp32."""
    if not gradients:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(gradients, dtype=torch.float32)
    return torch.stack(norms).square().sum()
