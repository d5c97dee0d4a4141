"""What a caption's tokens are: CLIP's vocabulary, where a caption starts and ends."""

import torch
from torch import Tensor

VOCAB_SIZE = 49408
START_ID = 49406
END_ID = 49407


def caption_lengths(tokens: Tensor) -> Tensor:
    """How many tokens each caption has, start and end included: (B, L) int64 -> (B,) int64.

    The end token has the greatest id of the vocabulary, which is what tells it from padding.
    """
    return tokens.argmax(1) + 1


def real_token_ids(tokens: Tensor) -> Tensor:
    """Where the captions' own tokens stand, up to and including the end token.

    The number of real tokens is a shape, so on a GPU this waits for the device: call it where the
    tokens still are on the CPU, and hand the result on.

    Args:
        tokens: (B, L) int64, zeros behind the end token.

    Returns:
        (T,) int64, row * L + column of each real token, ascending.
    """
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    return (columns < caption_lengths(tokens).unsqueeze(1)).flatten().nonzero().squeeze(1)
