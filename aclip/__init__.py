"""aclip: pre-training of CLIP-style models with attentive token removal, on DeepSpeed."""

__version__ = "0.1.0"
