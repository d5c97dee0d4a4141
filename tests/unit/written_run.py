"""A run with one checkpoint, written without training."""

import torch
from safetensors.torch import save_file

from aclip.config.recipe_file import dump_recipe
from aclip.models.student import build_student
from aclip.run_folder import checkpoint_folder


def write_run(run, recipe, has_teacher=True):
    """Writes the run folder and returns (it, student, teacher). All weights are random, biases and
    norms too, and the two models differ."""
    partial = run / "checkpoints" / "samples-000000000008.tmp"
    partial.mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    models = []
    for seed, name in enumerate(("student", "teacher")):
        model = build_student(recipe).eval()
        _randomise(model, seed)
        models.append(model)
        average = {n: p.detach() for n, p in model.named_parameters()}
        if name == "teacher":
            del average["logit_scale.log_logit_scale"]
        if name == "student" or has_teacher:
            save_file(average, partial / f"{name}.safetensors")
    checkpoint_folder.publish(partial.parent, partial, partial.with_suffix(""))
    return run, *models


def _randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.5 if parameter.ndim == 1 else 0.02
            parameter += size * torch.randn(parameter.shape, generator=generator)
