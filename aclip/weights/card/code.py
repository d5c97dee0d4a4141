"""The card's code: how each library loads an export and scores texts for an image."""

OPEN_CLIP = """\
import open_clip, torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:{name}")
tokenizer = open_clip.get_tokenizer("hf-hub:{name}")
with torch.no_grad():
    image = model.eval().encode_image(preprocess(Image.open("image.jpg"))[None], normalize=True)
    texts = model.encode_text(tokenizer(["a cat", "a dog"]), normalize=True)
print({probabilities})
"""
TRANSFORMERS = """\
from PIL import Image
from transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

model = VisionTextDualEncoderModel.from_pretrained("{name}").eval()
processor = VisionTextDualEncoderProcessor.from_pretrained("{name}")
options = dict(padding=True, truncation=True, return_tensors="pt")
inputs = processor(text=["a cat", "a dog"], images=[Image.open("image.jpg")], **options)
print(model(**inputs).logits_per_image.softmax(dim=-1))
"""
ACLIP = """\
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from aclip.data.images.views import center_crop
from aclip.evaluation.load_model import load_model
from aclip.evaluation.towers import image_embedder

folder = snapshot_download("{name}")
towers = load_model(f"{{folder}}/model.safetensors").towers(torch.device("cpu"))
image = center_crop(Image.open("image.jpg").convert("RGB"), towers.resolution)
with torch.no_grad():
    image = image_embedder(towers)(torch.from_numpy(image)[None])
    texts = towers.encode_text(towers.tokenizer.encode(["a cat", "a dog"]))
print(torch.cosine_similarity(image, texts))
"""
SAFETENSORS = """\
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

tensors = load_file(hf_hub_download("{name}", "model.safetensors"))
print({{name: tuple(tensor.shape) for name, tensor in tensors.items()}})
"""
_SCALED = "model.logit_scale.exp() * image @ texts.T"


def code_blocks(output_format: str, name: str, has_bias: bool) -> dict[str, str]:
    """Python code that loads an export, by the library that it needs.

    Args:
        output_format: as launch/export.py calls it.
        name: the export's on the Hub.
        has_bias: whether the model has a logit bias, so that its probabilities are SigLIP's.
    """
    if output_format == "open_clip":
        softmax = f"({_SCALED}).softmax(dim=-1)"
        sigmoid = f"({_SCALED} + model.logit_bias).sigmoid()"
        code = OPEN_CLIP.format(name=name, probabilities=sigmoid if has_bias else softmax)
        return {"open_clip": code}
    if output_format == "huggingface":
        return {"transformers": TRANSFORMERS.format(name=name)}
    return {"aclip": ACLIP.format(name=name), "safetensors": SAFETENSORS.format(name=name)}
