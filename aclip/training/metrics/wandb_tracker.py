"""Weights & Biases, an optional extra: the numbers and pictures of a run under one id, however
often it was interrupted."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from aclip.errors import ConfigError


def check_wandb(project: str, is_writer: bool) -> None:
    """Refuses a project that nothing could be sent to.

    Args:
        project: the recipe's train.wandb.
        is_writer: whether this process will send.

    Raises:
        ConfigError: the package is missing, or there is no key for an online run.
    """
    if not project:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"train.wandb is {project}, but the package wandb is not installed; install it with "
            "pip install -e '.[wandb]', or set train.wandb to an empty text"
        )
    if not is_writer:
        return
    import wandb

    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
        raise ConfigError(
            f"train.wandb is {project}, but Weights & Biases knows no key here; run wandb login, "
            "or set WANDB_MODE=offline and use wandb sync later"
        )


class WandbTracker:
    """Sends what rank 0 logs. The axis is samples.

    Args:
        project: the project of Weights & Biases.
        run_folder: names the run; what is to be sent lies in its folder wandb.
        run_id: the id of the run that goes on; empty for a new one.
        config: what the run is made of.

    Attributes:
        id: the run's id, which its checkpoints keep.
    """

    def __init__(self, project: str, run_folder: Path, run_id: str, config: dict[str, Any]):
        import wandb

        self._image = wandb.Image
        try:
            self._run = wandb.init(
                project=project,
                id=run_id or None,
                resume="allow",
                name=run_folder.resolve().name,
                dir=run_folder,
                config=config,
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"train.wandb is {project}, but Weights & Biases refuses: {error}; set "
                "WANDB_MODE=offline to send later"
            ) from None
        # Not its step, which can't go back: a run may go on from an older checkpoint.
        self._run.define_metric("*", step_metric="samples")
        self.id = self._run.id

    def log(self, numbers: dict[str, float], samples: int) -> None:
        self._run.log({**numbers, "samples": samples})

    def log_image(self, tag: str, array: np.ndarray, samples: int) -> None:
        """Adds a (H, W, 3) uint8 picture."""
        self._run.log({tag: self._image(array), "samples": samples})

    def close(self) -> None:
        self._run.finish()
