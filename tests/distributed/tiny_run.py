"""A tiny A-CLIP run on this rank: student, teacher, engine, and steps on fixed batches."""

import json
from pathlib import Path

import deepspeed
import torch
from small_recipe import SMALL_RECIPE
from torch import Tensor

from aclip.config.ds_config import read_ds_config
from aclip.config.recipe_file import load_recipe
from aclip.config.sections import TrainConfig
from aclip.distributed import rank, world_size
from aclip.engine.build import build_engine
from aclip.engine.host_copy import HostBuffers
from aclip.engine.process_group import init_distributed
from aclip.engine.sharded_state import ShardedState
from aclip.engine.snapshot import Snapshot
from aclip.method.losses.term import StudentOutput, Taught, total
from aclip.method.masks.attentive import select_attentive
from aclip.method.masks.policy import ViewsToMask
from aclip.method.tokens import END_ID, START_ID, clip_tokens
from aclip.models.student import StudentInput, build_student
from aclip.training.saver import Saver
from aclip.training.teacher import Teacher

BATCH = 8
SIDE = 32  # pixels of a view, 4 x 4 patches
LOGIT_SCALE = "logit_scale.log_logit_scale"
# Odd widths: two ranks can't halve them, so ZeRO-3 pads.
TINY = [
    f"train.global_batch_size={BATCH}",
    f"model.image.resolution={SIDE}",
    "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
    "model.text={width: 8, heads: 2, layers: 1, context_length: 16}",
    "model.embed_dim=11",
    "loss.simclr_widths=[21, 18, 9]",
    "loss.byol_widths=[19, 10]",
    f"teacher.resolution={SIDE}",
    "mask.block_size=1",
    "loss.simclr=1",
    "loss.byol=2",
]


class TinyRun:
    """The parts of a run on this rank, in a process group of any size.

    Args:
        folder: where the ds_config is written.
        stage: of ZeRO. dtype: "fp32" or "bf16".
        overrides: more of the recipe's.
        logit_scale: the logarithm that the logit scale starts at; None for its default.
        persistent: elements up to which ZeRO-3 keeps a parameter whole on every rank.
    """

    def __init__(self, folder, stage, dtype="fp32", overrides=(), logit_scale=None, persistent=100):
        self.device = init_distributed()
        self.recipe = load_recipe(SMALL_RECIPE, [*TINY, *overrides])
        path = folder / f"ds-{stage}-{dtype}-{rank()}.json"
        path.write_text(json.dumps(_ds_config(stage, dtype, persistent)))
        self.ds_config = read_ds_config(str(path), BATCH, world_size())
        student = build_student(self.recipe)
        if logit_scale is not None:
            torch.nn.init.constant_(student.logit_scale.log_logit_scale, logit_scale)
        self.initial = {name: p.detach().clone() for name, p in student.named_parameters()}
        self.terms = student.terms
        self.teacher = Teacher(student, self.ds_config.dtype, self.device)
        self.engine = build_engine(student, self.recipe.optimizer, self.ds_config)
        self.state = ShardedState(self.engine)

    def step(self, seed: int, scale_pull: float = 0.0) -> float:
        """One update on the batch of this seed, the same for any number of ranks.

        Args:
            scale_pull: this much of the logit scale is taken off the loss, so that it grows.

        Returns:
            The loss of the global batch.
        """
        pixels, tokens = (part.chunk(world_size())[rank()] for part in make_batch(seed))
        pixels = pixels.to(self.ds_config.dtype)
        size = len(tokens)
        taught = self.teacher.forward(pixels[:, 0])
        box = torch.tensor([0, 0, SIDE, SIDE], dtype=torch.int32)
        views = ViewsToMask(
            4,
            8,
            1,
            teacher_scores=taught.scores,
            teacher_box=box.repeat(size, 1),
            view_boxes=box.repeat(size, 2, 1),
        )
        inputs = StudentInput(pixels, select_attentive(views), clip_tokens(tokens).located())
        output = StudentOutput.of(self.engine("project", self.engine("encode", inputs)))
        targets = self.teacher.targets(self.terms, [Taught(taught.scores, taught.features)])
        loss, _ = total(self.terms, output, targets)
        loss = loss - scale_pull * output.logit_scale.sum()
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(loss, scale_wrt_gas=False)
        self.engine.step()
        mean = loss.detach().clone()
        if world_size() > 1:
            torch.distributed.all_reduce(mean)
        return mean.item() / world_size()

    def weights(self) -> dict[str, Tensor]:
        """Copies of the student's whole weights in its own dtype; every rank must call."""
        named = dict(self.engine.module.named_parameters())
        partitioned = [p for p in named.values() if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
            return {name: p.detach().clone() for name, p in named.items()}

    def master(self, name: str) -> Tensor:
        """A whole fp32 master through DeepSpeed's own accessor; every rank must call."""
        parameter = dict(self.engine.module.named_parameters())[name]
        if self.ds_config.stage == 0:
            return parameter.detach().clone()
        return deepspeed.utils.safe_get_full_fp32_param(parameter).clone()

    def save(self, root: Path, state: dict, keep: int = 2) -> Path:
        """Writes a checkpoint and waits for it; every rank must call. Returns its folder."""
        saver = Saver(root, self.engine, self.teacher, TrainConfig(keep_checkpoints=keep))
        saver.save(state, (state["samples"], []), required=True)
        saver.close()
        return root / f"samples-{state['samples']:012d}"

    def gathered(self) -> dict[tuple[str, str], Tensor]:
        """See Snapshot.collect; every rank must call. Clones, since pickle writes all of the
        memory that a tensor is a view into."""
        copies = Snapshot(self.state, HostBuffers()).collect()
        return {key: whole.clone() for key, whole in copies.items()}


def make_batch(seed: int) -> tuple[Tensor, Tensor]:
    """Pixels (8, 2, 3, 32, 32) and tokens (8, 8) of a seed, for all ranks together."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(BATCH, 2, 3, SIDE, SIDE, generator=generator)
    tokens = torch.randint(1, 500, (BATCH, 8), generator=generator)
    tokens[:, 0], tokens[:, -1] = START_ID, END_ID
    return pixels, tokens


def _ds_config(stage: int, dtype: str, persistent: int) -> dict:
    zero = {"stage": stage}
    if stage == 3:
        zero["memory_efficient_linear"] = False
        zero["stage3_param_persistence_threshold"] = persistent
    values = {"zero_optimization": zero, "gradient_clipping": 0.0}
    values["zero_allow_untested_optimizer"] = True  # of tests that take another than AdamW
    if dtype == "bf16":
        values["bf16"] = {"enabled": True}
        if stage > 1:
            values["data_types"] = {"grad_accum_dtype": "fp32"}
    return values
