"""Tiny text models of Hugging Face's with a tokenizer of a few words, written into a folder."""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "photo", "of", "red", "green", "circle", "dog"]
WORDS += [str(number) for number in range(10)] + ["thing", "square", "two"]
VOCAB = 40
POSITIONS = 24
KINDS = {
    "bert": {},
    "roberta": {"pad_token_id": 0},
    "xlm-roberta": {"pad_token_id": 0},
    "electra": {"embedding_size": 12},
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 2},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": POSITIONS},
    "llama": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 12},
}
CAUSAL = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "max_position_embeddings": POSITIONS,
}


def write_text_folder(folder, kind, words=WORDS, weights=True):
    """A folder as save_pretrained writes it; its weights are random, biases and norms too."""
    sizes = {} if kind in ("gpt2", "distilbert") else SIZES
    if kind == "distilbert":
        sizes = {"max_position_embeddings": POSITIONS}
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, **(sizes | KINDS[kind]))
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder) if weights else config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[SEP]"}
    if kind not in CAUSAL:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "sep_token": "[SEP]"}
        special |= {"cls_token": "[CLS]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder
