"""The FLOPs of a step against formulas written out here, part by part, and a published figure."""

import pytest
import torch
from small_recipe import SMALL_RECIPE
from torch import nn

from aclip.config.recipe_file import load_recipe, recipe_names
from aclip.data.synthetic import batch_of_mean_captions
from aclip.models.student import Student
from aclip.planning import measure_step as module_under_test
from aclip.planning.measure_step import MODES, measure_run, measure_step
from aclip.planning.meter import Flops, add_up
from aclip.planning.run_flops import sample_flops

# The small recipe's towers: 64 patches of 8 x 8 pixels, of which a view keeps 32 in 8 blocks of 4.
WIDTH, DEPTH, HEADS, PATCHES, KEPT, PIXELS = 96, 4, 3, 64, 32, 3 * 8 * 8
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, CONTEXT = 96, 2, 3, 32
EMBED, BATCH = 96, 32
CAPTION = 12  # tokens, ten of them word pieces


def measured(overrides=(), caption=CAPTION, num_ranks=1, modes=("none",), name=SMALL_RECIPE):
    recipe = load_recipe(name, list(overrides))
    context = recipe.model.text.context_length
    batch = batch_of_mean_captions(recipe, caption, context)
    return measure_step(recipe, batch, num_ranks, modes=modes)


def product(rows, inner, columns):
    return 2 * rows * inner * columns


def block(tokens, width, padded=None):
    """A transformer block; attention runs on padded rows where they are given."""
    attended = padded or tokens
    attention = 2 * product(attended, width, attended)  # scores, and the weighted sum
    mlp = product(tokens, width, 4 * width) + product(tokens, 4 * width, width)
    return product(tokens, width, 3 * width) + attention + product(tokens, width, width) + mlp


def one_query_block(tokens, width, heads):
    """One row of a block: the query, the query times W_k, and W_v times the weighted sum."""
    attention = 2 * product(heads, width, tokens)
    mlp = product(1, width, 4 * width) + product(1, 4 * width, width)
    return 3 * product(1, width, width) + attention + product(1, width, width) + mlp


EMBEDDING = product(PATCHES, PIXELS, WIDTH)
VIEW = (DEPTH - 1) * block(1 + KEPT, WIDTH) + one_query_block(1 + KEPT, WIDTH, HEADS)
CONTRASTIVE = 2 * 2 * 3 * product(1, EMBED, BATCH)  # 2 views, 2 directions, logits and 2 gradients


def text(caption):
    layers = (TEXT_LAYERS - 1) * block(caption, TEXT_WIDTH, padded=CONTEXT)
    return layers + one_query_block(CONTEXT, TEXT_WIDTH, TEXT_HEADS)


def expect(flops, forward, backward):
    assert (flops.forward, flops.backward) == (pytest.approx(forward), pytest.approx(backward))


def test_parts_of_a_step():
    parts = measured().flops
    assert set(parts) == {
        "image",
        "text",
        "teacher",
        "image_projection",
        "text_projection",
        "losses",
    }
    # The pixels need no gradient, so the embedding has one product in the backward pass.
    expect(parts["image"], 2 * (EMBEDDING + VIEW), 2 * (EMBEDDING + 2 * VIEW))
    expect(parts["text"], text(CAPTION), 2 * text(CAPTION))
    projection = product(2, WIDTH, EMBED)
    expect(parts["image_projection"], projection, 2 * projection)
    expect(parts["text_projection"], product(1, TEXT_WIDTH, EMBED), 2 * product(1, 96, EMBED))
    expect(parts["losses"], CONTRASTIVE, 0)  # the op computes gradients with the loss


def test_teacher_runs_forward_on_all_patches_with_scores():
    blocks = (DEPTH - 1) * block(1 + PATCHES, WIDTH) + one_query_block(1 + PATCHES, WIDTH, HEADS)
    scores = (DEPTH - 1) * product(1, WIDTH, 1 + PATCHES)
    expect(measured().flops["teacher"], EMBEDDING + blocks + scores, 0)


def test_teacher_runs_the_blocks_of_its_scores_and_the_others_only_for_a_loss():
    full, one_query = block(1 + PATCHES, WIDTH), one_query_block(1 + PATCHES, WIDTH, HEADS)
    scores = product(1, WIDTH, 1 + PATCHES)
    first_two = ["teacher.score_layers=2"]
    # The last block of the scores gives its attention beside the one row that it computes.
    expect(measured(first_two).flops["teacher"], EMBEDDING + full + scores + one_query, 0)
    with_byol = measured([*first_two, "loss.byol=2"]).flops["teacher"]
    projector = product(1, WIDTH, 256) + product(1, 256, 64)
    blocks = (DEPTH - 1) * full + one_query
    expect(with_byol, EMBEDDING + blocks + 2 * scores + projector, 0)


@pytest.mark.parametrize(
    "overrides, share",
    [
        ((), 1),
        (["mask.warmup=0.25"], 0.75),
        (["mask.warmup=0.25", "mask.warmup_change=gradual"], 1),
        (["mask.warmup=0.25", "loss.byol=2"], 1),
        (["teacher.reuse=2"], 0.5),
        (["mask.warmup=0.25", "teacher.reuse=3"], 0.25),  # epoch 1 of 0 to 3
        (["mask.warmup=0.375", "teacher.reuse=2"], 0.375),  # half of epoch 1, and epoch 2
    ],
)
def test_of_a_run_the_teacher_counts_by_its_share_of_the_steps(overrides, share):
    recipe = load_recipe(SMALL_RECIPE, ["train.epochs=4", *overrides])
    batch = batch_of_mean_captions(recipe, CAPTION, CONTEXT)
    every_step = measure_step(recipe, batch, modes=("none",))
    of_run = measure_run(recipe, batch, num_samples=100 * BATCH, modes=("none",))
    expected = dict(every_step.flops)
    expected["teacher"] = Flops(share * expected["teacher"].forward)
    assert of_run.flops == pytest.approx(expected)
    assert (of_run.heads, of_run.losses) == (every_step.heads, every_step.losses)


def test_a_cluster_mask_compares_every_patch_with_its_anchors():
    plain = ["teacher=null", "loss.simclr=0", "loss.byol=0"]
    parts = measured([*plain, "mask.policy=cluster", "mask.block_size=1"]).flops
    anchors = 2  # 3 % of 64, rounded up
    expect(parts["mask"], 2 * product(anchors, PIXELS, PATCHES), 0)
    assert parts["mask"].forward < 0.01 * parts["image"].forward and "teacher" not in parts
    overrides = ["mask.policy=cluster", "mask.block_size=1", "mask.cluster_embeddings=1"]
    mixed = measured([*plain, *overrides]).flops
    compared = product(anchors, PIXELS, PATCHES) + product(anchors, WIDTH, PATCHES)
    expect(mixed["mask"], 2 * compared, 0)
    once_more = mixed["image"].forward - parts["image"].forward
    assert (once_more, mixed["image"].backward) == (2 * EMBEDDING, parts["image"].backward)


def test_frozen_patch_embedding_has_no_backward_pass():
    image = measured(["model.image.freeze_patch_embed=true"]).flops["image"]
    expect(image, 2 * (EMBEDDING + VIEW), 2 * 2 * VIEW)


def test_heads_and_their_losses():
    plain = measured().flops
    parts = measured(["loss.simclr=1", "loss.byol=2"]).flops
    simclr = product(2, WIDTH, 256) + product(2, 256, 256) + product(2, 256, 64)
    expect(parts["simclr_head"], simclr, 2 * simclr)
    projector = product(2, WIDTH, 256) + product(2, 256, 64)
    expect(parts["byol_projector"], projector, 2 * projector)
    predictor = product(2, 64, 256) + product(2, 256, 64)
    expect(parts["byol_predictor"], predictor, 2 * predictor)
    expect(parts["teacher"], plain["teacher"].forward + projector / 2, 0)  # of one view
    logits = 4 * product(1, 64, BATCH)  # each of 2 views against both
    expect(parts["losses"], CONTRASTIVE + logits, 2 * logits)
    assert parts["image"] == plain["image"]


def test_masked_modelling():
    overrides = ["loss.distill=1", "distill.num_codewords=128", "loss.mlm=1"]
    plain, parts = measured().flops, measured(overrides).flops
    masked = 48  # three quarters of the patches
    more = EMBEDDING + DEPTH * block(1 + PATCHES - masked, WIDTH)
    expect(
        parts["image"],
        plain["image"].forward + more,
        plain["image"].backward + 2 * more - EMBEDDING,
    )
    decoder = block(1 + PATCHES, WIDTH) + product(masked, WIDTH, WIDTH)
    expect(parts["distill_decoder"], decoder, 2 * decoder)
    codewords = product(masked, WIDTH, 128)
    expect(parts["codewords"], codewords, 2 * codewords)
    targets = EMBEDDING + DEPTH * block(1 + PATCHES, WIDTH) + codewords
    expect(parts["teacher"], plain["teacher"].forward + targets, 0)
    all_tokens = text(CAPTION) + TEXT_LAYERS * block(CAPTION, TEXT_WIDTH, padded=CONTEXT)
    expect(parts["text"], all_tokens, 2 * all_tokens)
    # 20 % of ten word pieces
    decoder = 4 * block(CONTEXT, TEXT_WIDTH) + product(2, TEXT_WIDTH, 49408)
    expect(parts["mlm_decoder"], decoder, 2 * decoder)


def test_views_for_simclr_alone_are_the_image_towers_work():
    overrides = ["mask.policy=none", "teacher=null", "views={student: 1, ssl: 2}", "loss.simclr=1"]
    whole = (DEPTH - 1) * block(1 + PATCHES, WIDTH) + one_query_block(1 + PATCHES, WIDTH, HEADS)
    image = measured(overrides).flops["image"]
    expect(image, 3 * (EMBEDDING + whole), 3 * (EMBEDDING + 2 * whole))


@pytest.mark.parametrize("caption", [12.5, 7.25, 32])
def test_captions_have_any_mean_length(caption):
    # Linears run on real tokens, whose number is a mean; attention on the context.
    expect(measured(caption=caption).flops["text"], text(caption), 2 * text(caption))


def test_an_attention_pool_is_one_query_behind_whole_blocks():
    kwargs = f"{{patch_size: 8, embed_dim: {WIDTH}, depth: {DEPTH}, num_heads: {HEADS}, "
    overrides = ["mask.policy=random", "teacher=null"]
    pooled = f"model.image.kwargs={kwargs}class_token: false, global_pool: map}}"
    view = DEPTH * block(KEPT, WIDTH) + one_query_block(KEPT, WIDTH, HEADS)
    # The pool's query is one for all images.
    query = product(1, WIDTH, WIDTH)
    image = measured([*overrides, pooled]).flops["image"]
    assert image.forward == pytest.approx(2 * (EMBEDDING + view - query), rel=1e-3)


def test_a_sample_costs_the_same_on_any_number_of_ranks():
    overrides = ["loss.simclr=1", "loss.byol=2"]
    one, four = measured(overrides), measured(overrides, num_ranks=4)
    assert one.flops.keys() == four.flops.keys()
    for name, flops in one.flops.items():
        expect(four.flops[name], flops.forward, flops.backward)


def test_vit_b_16_has_its_published_size():
    overrides = ["loss.distill=1", "distill.targets=features", "teacher={resolution: 224}"]
    teacher = measured(overrides, name="clip_vitb16").flops["teacher"]
    # The teacher's features of all patches: 17.6 G multiply-adds (DeiT, arXiv:2012.12877, table 5).
    assert teacher.forward == pytest.approx(2 * 17.6e9, rel=0.005)


def test_recomputed_blocks_run_forward_once_more():
    step = measured(["model.image.recompute=blocks"], modes=MODES)
    # But for their last product, of which the backward pass needs the input alone.
    full = block(1 + KEPT, WIDTH) - product(1 + KEPT, 4 * WIDTH, WIDTH)
    last = one_query_block(1 + KEPT, WIDTH, HEADS) - product(1, 4 * WIDTH, WIDTH)
    assert step.repeated_flops(1) == pytest.approx(2 * ((DEPTH - 1) * full + last))
    assert step.flops["image"].backward == pytest.approx(2 * (EMBEDDING + 2 * VIEW))
    assert measured(["model.image.recompute=elementwise"], modes=MODES).repeated_flops(1) == 0


def test_towers_run_again_in_all_micro_steps_but_the_last():
    step = measured(["loss.simclr=1", "loss.byol=2"])
    towers = 2 * (EMBEDDING + VIEW) + text(CAPTION)
    assert step.repeated_flops(4) == pytest.approx(3 / 4 * towers)
    assert step.repeated_flops(1) == 0


def test_compiled_towers_are_measured_as_they_are_written():
    assert measured(["model.compile=true"]).flops == measured().flops


class StudentWithMore(Student):
    """A student with a head that planning knows nothing of."""

    def add(self):
        self.adapter = nn.Linear(WIDTH, EMBED)

    def project(self, features):
        output = super().project(features)
        more = self.adapter(features["image"]).tanh()
        return output | {"image_embeds": output["image_embeds"] + more}


def test_a_part_of_which_planning_is_not_told_is_counted(monkeypatch):
    plain = measured()
    build = module_under_test.build_student

    def build_with_more(recipe):
        student = build(recipe)
        student.__class__ = StudentWithMore
        student.add()
        return student

    monkeypatch.setattr(module_under_test, "build_student", build_with_more)
    more = measured()
    adapter = product(2, WIDTH, EMBED)
    expect(more.flops["adapter"], adapter, 2 * adapter)
    assert more.total_flops == pytest.approx(plain.total_flops + 3 * adapter)
    # tanh keeps its output, of 2 views in fp32.
    assert more.heads == plain.heads + BATCH * 2 * EMBED * 4


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_measured(name):
    # As deep as the scores of any recipe, and no deeper.
    shallow = ["model.image.kwargs={patch_size: 16, depth: 4}", "model.text.layers=2"]
    recipe = load_recipe(name, shallow)
    parts = measured(shallow, name=name).flops
    assert {"image", "text", "losses"} <= parts.keys()
    assert ("teacher" in parts) == recipe.needs_teacher
    assert "student" not in parts, "all products are made by modules"
    assert ("mask" in parts) == (recipe.mask.policy == "cluster")
    assert add_up(parts).backward > 0
    assert not torch.distributed.is_initialized()


def test_flops_of_a_vit_b_16_are_near_its_published_figure():
    """17.58 G multiply-adds forward (DeiT, arXiv:2012.12877) and twice as many backward; the text
    tower's 12 layers of width 512 add 24 d^2 FLOPs a layer for each of 20 tokens. Of the 12th
    block, of both, only the row of the feature is computed."""
    image, text = 2 * 17.58e9, 12 * 24 * 512**2 * 20
    expected = 3 * (image + text) * 11 / 12
    assert sample_flops(load_recipe("clip_vitb16"), 15e6) == pytest.approx(expected, rel=0.01)
