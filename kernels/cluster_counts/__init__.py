"""cluster_counts: in how many anchors' clusters each patch of a view lies."""

from aclip.kernels.cluster_counts.op import cluster_counts
from aclip.kernels.cluster_counts.reference import anchor_similarity, cluster_counts_reference

__all__ = ["anchor_similarity", "cluster_counts", "cluster_counts_reference"]
