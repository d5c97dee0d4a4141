"""The rank of the right answer among all candidates: shared by zero-shot and retrieval."""

import torch
from torch import Tensor

MAX_SCORES = 2**24
"""Scores held at a time; with their float64 form and the masks about half a GiB."""

UNANSWERED = torch.iinfo(torch.int64).max
"""The rank of a query without an answer: above every k, even one beyond the candidates' number."""


def rank_answers(
    queries: Tensor,
    candidates: Tensor,
    query_labels: Tensor,
    candidate_labels: Tensor,
    max_scores: int = MAX_SCORES,
) -> Tensor:
    """Places of the best right candidate of each query; 0 is the top.

    Candidates are ordered by score, highest first; equal scores by index, lowest first, so that
    embeddings that are all alike score at chance. A candidate is right if its label is the query's.
    A NaN ranks ahead of every other score, and a right candidate's NaN leaves its query unanswered,
    so that a diverged model never looks good.

    Scores are computed in float64 and rounded to fp32: no TF32, and equal embeddings tie in
    whatever order a matrix product sums them.

    Args:
        queries: (n, E) float embeds.
        candidates: (m, E) float embeds.
        query_labels: (n,) int64.
        candidate_labels: (m,) int64.
        max_scores: bound of the scores held at a time; the result does not depend on it.

    Returns:
        (n,) int64; UNANSWERED for a query without a right candidate. No gradient.
    """
    num_candidates = len(candidates)
    chunk = max(1, max_scores // max(1, num_candidates))
    candidates = candidates.detach().double().T
    index = torch.arange(num_candidates, device=candidates.device)
    ranks = []
    for rows, labels in zip(queries.detach().split(chunk), query_labels.split(chunk), strict=True):
        scores = (rows.double() @ candidates).float()  # (chunk, m)
        is_right = labels[:, None] == candidate_labels[None]
        best = scores.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)  # NaN wins amax
        first = torch.where(is_right & (scores == best), index, num_candidates).amin(
            1, keepdim=True
        )
        ahead = ~(scores <= best) | ((scores == best) & (index < first))
        answered = is_right.any(1) & ~best.squeeze(1).isnan()
        ranks.append(torch.where(answered, ahead.sum(1), UNANSWERED))
    return torch.cat(ranks) if ranks else query_labels.new_zeros(0)


def share_within(ranks: Tensor, k: int) -> float:
    """Share of the ranks below k, in [0, 1]: recall or accuracy at k; 0 for no ranks at all."""
    return (ranks < k).double().mean().item() if len(ranks) else 0.0
