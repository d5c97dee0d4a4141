"""Edges of the ranking that the metrics above it do not reach."""

import torch

from aclip.evaluation.metrics.ranking import UNANSWERED, rank_answers, share_within


def test_query_without_a_right_candidate_is_answered_by_no_k():
    ranks = rank_answers(torch.eye(2), torch.eye(2), torch.tensor([0, 9]), torch.tensor([0, 1]))
    assert ranks.tolist() == [0, UNANSWERED]
    assert share_within(ranks, 1000) == 0.5


def test_no_queries_give_no_ranks():
    ranks = rank_answers(
        torch.zeros(0, 2), torch.eye(2), torch.zeros(0, dtype=torch.int64), torch.tensor([0, 1])
    )
    assert ranks.tolist() == []
    assert share_within(ranks, 1) == 0.0
