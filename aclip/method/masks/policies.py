"""The mask policies by the names that `mask.policy` gives them."""

from aclip.method.masks.attentive import ATTENTIVE, INVERSE
from aclip.method.masks.cluster import CLUSTER
from aclip.method.masks.gaussian import GAUSSIAN
from aclip.method.masks.policy import MaskPolicy
from aclip.method.masks.random import RANDOM

NONE = MaskPolicy(
    "none",
    lambda views: None,
    "This run drops no patch: shown is the half that attention would keep.",
)
POLICIES = {policy.name: policy for policy in (NONE, RANDOM, GAUSSIAN, CLUSTER, ATTENTIVE, INVERSE)}
