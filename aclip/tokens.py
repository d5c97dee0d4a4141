"""What a caption's tokens are: CLIP's vocabulary, where a caption starts and ends."""

import torch
from torch import Tensor

VOCAB_SIZE = 49408
START_ID = 49406
END_ID = 49407


def real_token_ids(tokens: Tensor) -> Tensor:
    """Where the captions' own tokens stand, up to and including the end token.

    The number of real tokens is a shape, so on a GPU this waits for the device: call it where the
    tokens still are on the CPU, and hand the result on.

    Args:
        tokens: (B, L) int64; the end token has the greatest id.

    Returns:
        (T,) int64, row * L + column of each real token, ascending.
    """
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    return (columns <= tokens.argmax(1, keepdim=True)).flatten().nonzero().squeeze(1)
