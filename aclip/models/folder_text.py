"""A text tower out of a folder of Hugging Face's: transformers' own model, on packed captions.

Its embeddings, linears and norms see one long row of the captions' own tokens, each with its
position in its caption. Attention alone is ours: it pads queries, keys and values, so that no token
reads another caption. B captions, L tokens of the longest, T tokens of all, H heads of d, W width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from aclip.config.sections import TextTowerConfig
from aclip.config.text_folder import FIELD, TextFolder, read_text_folder
from aclip.errors import ConfigError
from aclip.method.tokens import Tokens
from aclip.models.packing import Packing, packing_of

_ATTENTION = "aclip_packed"
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError)
_WITH_POOLER = ("bert", "roberta", "xlm-roberta")


@dataclass(frozen=True)
class _Captions:
    """What attention has to know of the packed captions; `keys` (B, 1, 1, L) bool tells the tokens
    from the padding, and is None where the mask is causal."""

    packing: Packing
    keys: Tensor | None


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    captions: _Captions | None = None,
    **_,
) -> tuple[Tensor, None]:
    """transformers' interface of an attention: query (1, H, T, d), key and value (1, h, T, d) ->
    (1, T, H, d). Dropout is left out, see FolderTextTower."""
    packing = captions.packing
    heads = [
        packing.pad(part[0].transpose(0, 1).flatten(1)).unflatten(2, (part.shape[1], -1))
        for part in (query, key, value)
    ]
    q, k, v = (part.transpose(1, 2) for part in heads)  # (B, H or h, L, d)
    if k.shape[1] != q.shape[1]:
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=captions.keys,
        is_causal=captions.keys is None,
        scale=scaling,
    )
    packed = packing.pack(out.transpose(1, 2).flatten(2))
    return packed.unflatten(1, (query.shape[1], -1)).unsqueeze(0), None


AttentionInterface.register(_ATTENTION, _packed_attention)


class FolderTextTower(nn.Module):
    """Captions to features by a model of transformers', with the public side of TextTower.

    Dropout is off, whatever the folder says: a step must not depend on the number of ranks, and
    CLIP's towers have none.

    Args:
        config: names the folder, and says how the feature is read.

    Raises:
        ConfigError: the folder can't be a text tower, see read_text_folder.
    """

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        folder = read_text_folder(config)
        self.transformer = _load(config, folder)
        self.transformer.config.use_cache = False
        for module in self.transformer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        own = self.transformer.config
        self.width = own.hidden_size
        self.num_heads = own.num_attention_heads
        self.context_length = config.context_length
        self.pooling = config.pooling or ("end" if folder.is_causal else "cls")
        self.identity = f"{self.pooling} {self.context_length} {folder.digest()}"
        self.pretrained = config.pretrained
        self.recompute = config.recompute
        self._is_causal = folder.is_causal
        self._first_position = folder.first_position

    @property
    def recompute(self) -> str:
        """What the backward pass computes again: none, or each of the model's blocks."""
        return self._recompute

    @recompute.setter
    def recompute(self, recompute: str) -> None:
        self._recompute = recompute
        if recompute == "blocks":
            self.transformer.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.transformer.activation_checkpointing_disable()

    def _apply(self, fn, recurse: bool = True):
        """Moves the module as ever, but keeps tables such as rotary frequencies in their dtype: in
        bf16 the positions of late tokens would be off."""
        tables = {
            name: buffer
            for name, buffer in self.transformer.named_buffers()
            if buffer.is_floating_point()
        }
        super()._apply(fn, recurse)
        for name, table in tables.items():
            module_name, _, own_name = name.rpartition(".")
            owner = self.transformer.get_submodule(module_name)
            device = getattr(owner, own_name).device
            if not table.is_meta:
                setattr(owner, own_name, table.to(device))
        return self

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks, from the input on."""
        depth = self.transformer.config.num_hidden_layers
        lists = (each for each in self.transformer.modules() if isinstance(each, nn.ModuleList))
        return list(next(each for each in lists if len(each) == depth))

    def external_parameters(self) -> list[nn.Parameter]:
        """None: the model is called as transformers calls it."""
        return []

    def forward(self, tokens: Tokens) -> Tensor:
        """Encodes captions to (B, W): the feature at the end token, at the first one, or the mean.

        On a GPU, tokens that are not `located` make the step wait for the device.
        """
        packing = packing_of(tokens)
        columns = torch.arange(packing.shape[1], device=tokens.ids.device)
        is_real = columns < tokens.lengths.unsqueeze(1)  # (B, L)
        keys = None if self._is_causal else is_real[:, None, None, :]
        positions = packing.real_ids % packing.shape[1] + self._first_position
        x = self.transformer(
            input_ids=tokens.ids.flatten().index_select(0, packing.real_ids).unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            captions=_Captions(packing, keys),
        ).last_hidden_state[0]  # (T, W)
        if self.pooling == "mean":
            return packing.pad(x).sum(1) / tokens.lengths.unsqueeze(1).to(x.dtype)
        ends = tokens.lengths.cumsum(0)
        rows = ends - 1 if self.pooling == "end" else ends - tokens.lengths
        return x.index_select(0, rows)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bar and table of keys, which every rank would print."""
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def _load(config: TextTowerConfig, folder: TextFolder) -> PreTrainedModel:
    path = str(folder.path)
    options = {"attn_implementation": _ATTENTION, "dtype": torch.float32}
    if folder.values["model_type"] in _WITH_POOLER:
        options["add_pooling_layer"] = False
    try:
        # On the meta device shapes are enough, and weights could not be copied there.
        if not config.pretrained or torch.get_default_device().type == "meta":
            own = AutoConfig.from_pretrained(path, local_files_only=True)
            return AutoModel.from_config(own, **options)
        with _quietly():
            model, info = AutoModel.from_pretrained(
                path, local_files_only=True, output_loading_info=True, **options
            )
    except (*_UNREADABLE, SafetensorError, UnpicklingError) as error:
        raise ConfigError(
            f"{FIELD} is {config.name}, which transformers can't load "
            f"({' '.join(str(error).split())[:300]}); give a folder that save_pretrained wrote"
        ) from None
    missing = sorted(info["missing_keys"]) + sorted(str(each) for each in info["mismatched_keys"])
    if missing:
        raise ConfigError(
            f"{FIELD} is {config.name}, whose weights lack {missing[0]} and {len(missing) - 1} "
            "more; give whole weights, or start at random with model.text.pretrained=false"
        )
    return model
