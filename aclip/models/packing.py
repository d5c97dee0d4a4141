"""Captions behind each other, without padding: what linears, norms and embeddings run on."""

from dataclasses import dataclass

from torch import Tensor

from aclip.method.tokens import Tokens


@dataclass(frozen=True)
class Packing:
    """Which of the B x L positions the T packed rows are."""

    real_ids: Tensor
    """(T,) int64, row * L + column of each."""
    shape: tuple[int, int]
    """(B, L)."""

    def pad(self, packed: Tensor) -> Tensor:
        """(T, W) -> (B, L, W), zero at padding: causal attention to it must stay finite."""
        padded = packed.new_zeros(self.shape[0] * self.shape[1], packed.shape[1])
        # Not index_copy_, whose backward pass would keep `packed`; in place, as nothing reads the
        # zeros before.
        return padded.index_put_((self.real_ids,), packed).view(*self.shape, -1)

    def pack(self, padded: Tensor) -> Tensor:
        """(B, L, W) -> (T, W)."""
        return padded.flatten(0, 1).index_select(0, self.real_ids)


def packing_of(tokens: Tokens) -> Packing:
    return Packing(tokens.located().real_ids, tuple(tokens.ids.shape))
