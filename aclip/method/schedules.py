"""Steps of a run, and its learning rate and EMA momentum as functions of the samples seen."""

import math


def count_steps(epochs: float, dataset_size: float, global_batch_size: int) -> int:
    """Optimizer steps of a run: the batches nearest to that many passes, at least one."""
    return max(1, round(epochs * dataset_size / global_batch_size))


def learning_rate(
    samples: int, *, total: int, warmup: int, start: float, peak: float, final: float
) -> float:
    """Linear warm-up from `start` to `peak` over `warmup` samples, then a cosine to `final` at
    `total`.

    Source: A-CLIP's and SLIP's published schedule (arXiv:2212.08653, section 4.1).
    """
    if samples < warmup:
        return start + (peak - start) * samples / warmup
    progress = min(1.0, (samples - warmup) / max(1, total - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def ema_momentum(samples: int, *, total: int, start: float) -> float:
    """The teacher's momentum: from `start` at 0 to 1 at `total` samples on a cosine (BYOL's
    schedule)."""
    progress = min(1.0, samples / max(1, total))
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * progress))
