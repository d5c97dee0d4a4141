"""A pretrained image tower of timm's, out of Hugging Face's cache or from its hub."""

from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub.constants
import timm
from torch import Tensor

from aclip.weights import hub
from aclip.weights.names import TowerFacts, vit_facts


def fetch_timm_model(name: str) -> tuple[dict[str, Tensor], TowerFacts]:
    """The weights of a VisionTransformer that timm names, without its classifier.

    Where the hub does not answer, what is in the cache is used, and anything else is refused after
    a few seconds; the hub's own client tries for a minute.

    Raises:
        ValueError: timm knows no such model, has no weights of it, or can't fetch them; the message
            ends a sentence.
    """
    if not timm.is_model(name):
        raise ValueError("is neither a file nor a model that timm knows")
    is_offline = not hub.is_reachable()
    try:
        with _offline(is_offline):
            vit = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        if is_offline:
            raise ValueError(
                f"needs weights that are not in Hugging Face's cache, while {hub.unreachable()}; "
                "fetch them where it can be (HF_HOME says where the cache is), or give timm: and a "
                "file"
            ) from None
        raise ValueError(f"timm can't fetch ({' '.join(str(error).split())})") from None
    try:
        return vit.state_dict(), vit_facts(vit)
    except (AttributeError, TypeError, LookupError):
        raise ValueError("is no VisionTransformer") from None


@contextmanager
def _offline(is_offline: bool) -> Iterator[None]:
    constants = huggingface_hub.constants
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, is_offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
