"""An evaluation set of grey images, and a linear probe on their grey."""

import torch
from PIL import Image

from aclip.evaluation.linear_probe import linear_probe
from aclip.evaluation.sets.evaluation_set import Example
from aclip.evaluation.towers import Towers


class Greys:
    """Images of one grey value, which their labels follow."""

    name = "greys"

    def __init__(self, values, labels):
        self.num_samples = len(values)
        self._samples = list(zip(values, labels, strict=True))

    def read(self, rank, world_size):
        for index in range(rank, self.num_samples, world_size):
            value, label = self._samples[index]
            image = Image.new("RGB", (4, 4), (value,) * 3)
            yield index, lambda image=image, label=label: Example(image, label, [])


def probe(train, test, scale=1.0, progress=None):
    """The probe's metrics, on all ranks; the features are `scale` times the grey."""
    towers = Towers(None, None, None, 4, torch.device("cpu"), torch.float32, (0.5,) * 3, (0.1,) * 3)

    def encode(pixels):
        return scale * pixels[:, :2, 0, 0]

    return linear_probe(towers, encode, train, test, 7, progress)
