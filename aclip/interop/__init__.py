"""What other projects call aclip's weights. One module a format, functions of state dicts.

aclip's own names: `image.vit.*` as timm has them, `text.transformer.*` as transformers has them,
`image_projection.weight`, `text_projection.weight` (E, C), `logit_scale.log_logit_scale` (1,).
"""
