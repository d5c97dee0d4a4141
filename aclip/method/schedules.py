"""Steps of a run, and its learning rate and EMA momentum as functions of the samples seen."""

import math


def count_steps(epochs: float, num_samples: float, global_batch_size: int) -> int:
    """Optimizer steps of a run: the batches nearest to that many passes, at least one."""
    return max(1, round(epochs * num_samples / global_batch_size))


def learning_rate(
    samples: int,
    *,
    total: int,
    warmup: int,
    start: float,
    peak: float,
    final: float,
    schedule: str = "cosine",
    cooldown: float = 0.0,
    cooldown_shape: str = "linear",
) -> float:
    """Linear warm-up from `start` to `peak` over `warmup` samples, then the schedule.

    - cosine, linear: from `peak` to `final` at `total`.
    - constant: `peak`, and in the last `cooldown` of the run from there to `final` at `total`,
      linearly or as 1 - sqrt(share of the cool-down that is over).

    Sources: A-CLIP's and SLIP's published schedule is the cosine (arXiv:2212.08653, section 4.1);
    constant with cool-down is that of arXiv:2405.18392.
    """
    if samples < warmup:
        return start + (peak - start) * samples / warmup
    if schedule == "constant":
        warmup = total - cooldown * total
    progress = min(1.0, max(0.0, (samples - warmup) / max(1, total - warmup)))
    if schedule == "cosine":
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "constant" and not cooldown:
        return peak
    if schedule == "constant" and cooldown_shape == "1-sqrt":
        progress = math.sqrt(progress)
    return final + (peak - final) * (1 - progress)


def ema_momentum(samples: int, *, total: int, start: float) -> float:
    """The teacher's momentum: from `start` at 0 to 1 at `total` samples on a cosine (BYOL's
    schedule)."""
    progress = min(1.0, samples / max(1, total))
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * progress))
