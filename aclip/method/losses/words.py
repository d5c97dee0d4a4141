"""Caption-word classification: which tokens the caption holds, told from the image's feature alone.

B images of this rank, V views, C width of the image feature, L columns of the captions' ids.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from aclip.distributed import world_size
from aclip.method.losses.chunks import by_chunks, soft_cross_entropy
from aclip.method.losses.term import SampleTerm, Taught, TermContext, TermPart
from aclip.method.tokens import VOCAB_SIZE, Tokens
from aclip.section import Section, Weight

CHUNK_ROWS = 512
"""Views whose logits on the vocabulary exist at once: 100 MB of them in fp32, and as much of their
gradient."""


class Keys(Section):
    words: Weight = 0.0
    """Weight of caption-word classification (SuperClass, SuperCLIP): a linear head of the image
    feature on the vocabulary, whose target is the caption's distinct tokens, rare ones more. The
    head has 49,408 weights for each channel of the tower, and exists in training alone. It is an
    auxiliary loss, since it trains no text tower."""


@dataclass(frozen=True)
class WordsInput:
    """The targets of a micro-batch.

    Attributes:
        ids: (B, L) int64, each caption's ids in ascending order; with N captions of an image
            (B, N * L), those of its captions behind each other.
        weights: the same shape, fp32, what each of them is of the target; 0 for what is no target.
            A caption's sum to 1, or to 0 where it has no target.
    """

    ids: Tensor
    weights: Tensor


class Words(SampleTerm):
    """The frequencies that weigh the targets are counted over the steps of the run, once a step on
    the global batch, and before they are used, as the released code counts them."""

    name, keys, trains = "words", Keys, ("image",)

    def __init__(self, recipe):
        super().__init__(recipe)
        self._num_steps = 0
        self._shares = torch.zeros(VOCAB_SIZE, dtype=torch.float64)

    @classmethod
    def check(cls, recipe) -> None:
        if recipe.model.text.name:
            raise ValueError(
                f"loss.words is {recipe.loss.words:g}, which counts the tokens of CLIP's "
                f"vocabulary, but model.text.name is {recipe.model.text.name}, a tower with "
                "another; set loss.words to 0"
            )

    def parts(self, student: nn.Module) -> dict[str, TermPart]:
        return {"words_head": TermPart(WordsHead(student.image.width, VOCAB_SIZE))}

    def statistic(
        self,
        taught: list[Taught],
        tokens: list[Tokens],
        to_device: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """(vocabulary,) fp32, each token's weight, from this step's captions and those before."""
        counts = sum(count_tokens(part.map(to_device)) for part in tokens)
        if world_size() > 1:
            dist.all_reduce(counts)
        # Whole numbers until here, so that the shares are the same for any number of ranks.
        counts, num_captions = counts.double().split((VOCAB_SIZE, 1))
        self._num_steps += 1
        self._shares = self._shares.to(counts.device) + counts / num_captions
        return token_weights(self._shares, self._num_steps, num_captions)

    def state_dict(self) -> dict[str, Tensor]:
        return {"num_steps": torch.tensor(self._num_steps), "shares": self._shares}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._num_steps, self._shares = int(state["num_steps"]), state["shares"]

    def inputs(self, context: TermContext) -> WordsInput:
        tokens = context.tokens.map(context.to_device)
        ids, is_target = distinct_tokens(tokens)
        weights = context.statistic[ids] * is_target
        # A caption without targets, or with tokens alone that every caption holds, has the sum 0.
        total = weights.sum(1, keepdim=True)
        weights = weights / total.masked_fill(total == 0, 1)
        if tokens.num_captions is None:
            return WordsInput(ids, weights)
        # An image's target is the mean of its captions' targets.
        size = len(tokens)
        weights = weights.view(size, -1) / tokens.num_captions.unsqueeze(1)
        return WordsInput(ids.view(size, -1), weights)

    def encode(self, student: nn.Module, inputs, features: dict[str, Tensor]) -> Tensor:
        """(B,) fp32, the term of each sample."""
        own: WordsInput = inputs.of_terms[self.name]
        return student.words_head(features["image"], own.ids, own.weights)


class WordsHead(nn.Linear):
    """The linear head on the vocabulary, and its soft cross-entropy by chunks of views.

    Args:
        width: C.
        vocab_size: size of the tokenizer's vocabulary.

    Source: SuperClass, arXiv:2411.03313; beside a contrastive loss SuperCLIP, arXiv:2512.14480.
    """

    def __init__(self, width: int, vocab_size: int):
        super().__init__(width, vocab_size)
        nn.init.normal_(self.weight, std=width**-0.5)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The soft cross-entropy of each image, mean over its views.

        Args:
            features: (B, V, C) float.
            ids, weights: (B, L), see WordsInput.

        Returns:
            (B,) fp32; 0 for an image without targets. The logits are computed again in the backward
            pass, so that those of one chunk alone exist at a time.
        """
        num_views = features.shape[1]
        ids, weights = (each.repeat_interleave(num_views, 0) for each in (ids, weights))
        losses = by_chunks(self._of_rows, CHUNK_ROWS, features.flatten(0, 1), ids, weights)
        return losses.view(-1, num_views).mean(1)

    def _of_rows(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        logits = F.linear(rows, self.weight, self.bias)
        return soft_cross_entropy(logits.float(), ids, weights)


def distinct_tokens(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The distinct tokens of each caption; start, end and padding are none.

    Returns:
        (B, L) int64, the ids in ascending order; and (B, L) bool, true at one place of each token.
    """
    columns = torch.arange(tokens.ids.shape[1], device=tokens.ids.device)
    is_own = (columns > 0) & (columns < tokens.ends.unsqueeze(1))
    # What is no target stands in front of all ids. An id of 0 is a word piece as others are.
    ordered = tokens.ids.masked_fill(~is_own, -1).sort(1).values
    is_new = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    return ordered.clamp(min=0), is_new & (ordered >= 0)


def token_weights(shares: Tensor, num_steps: int, num_captions: Tensor) -> Tensor:
    """log((n + 1/N) / (c + 1/N)): 0 for a token that every caption held, the more the rarer it is.

    Args:
        shares: (vocabulary,) fp64, c: the sum over n steps of the share of a step's captions that
            hold each token, this step's included.
        num_steps: n.
        num_captions: N, fp64, the captions of a step.

    Returns:
        (vocabulary,) fp32.

    Source: SuperClass, arXiv:2411.03313. There start, end and padding are targets too.
    """
    smoothing = 1 / num_captions
    return ((num_steps + smoothing) / (shares + smoothing)).log().float()


def count_tokens(tokens: Tokens) -> Tensor:
    """(vocabulary + 1,) int64, how many of the captions hold each token, and how many there are."""
    ids, is_target = distinct_tokens(tokens)
    # Not bincount, which waits for the device.
    counts = ids.new_zeros(VOCAB_SIZE + 1)
    counts.scatter_add_(0, ids.flatten(), is_target.flatten().long())
    counts[-1] = len(tokens) if tokens.num_captions is None else tokens.num_captions.sum()
    return counts
