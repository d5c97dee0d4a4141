"""Losses, BatchNorm and gathering on two ranks equal one process on the joined batch.

The joined side is written with torch.nn.functional alone: whole matrices of the joined batch in
float64, autograd through them.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_recipe import SMALL_RECIPE

from aclip import distributed
from aclip.config.recipe_file import load_recipe
from aclip.method.losses.byol import byol
from aclip.method.losses.contrastive import contrastive
from aclip.method.losses.heads import GlobalBatchNorm
from aclip.method.losses.sigmoid import sigmoid
from aclip.method.losses.simclr import simclr
from aclip.method.losses.term import StudentOutput, total

pytestmark = pytest.mark.distributed

NUM_RANKS, LOCAL_BATCH, WIDTH = 2, 5, 7
BATCH = NUM_RANKS * LOCAL_BATCH


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def joined_contrastive(images, texts, scale):
    labels = torch.arange(len(texts))
    texts = F.normalize(texts, dim=-1)
    loss = 0
    for view in F.normalize(images, dim=-1).unbind(1):
        logits = scale * view @ texts.T
        loss = loss + F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
    return loss / (2 * images.shape[1])


def joined_simclr(embeds, temperature):
    """The (2 N, 2 N) matrix of the SimCLR paper, its diagonal taken out."""
    size = len(embeds)
    stacked = F.normalize(torch.cat(embeds.unbind(1)), dim=-1)
    logits = (stacked @ stacked.T / temperature).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, (torch.arange(2 * size) + size) % (2 * size))


def joined_byol(predictions, targets):
    return (2 - 2 * F.cosine_similarity(predictions, targets[:, None], dim=-1)).mean()


# Each: parameters, inputs of the whole batch, and the loss on one rank and on the joined batch.
# The inputs pass through a shared weight, whose gradients the ranks average as DeepSpeed does.
def contrastive_case(num_views):
    parameters = {
        "images": randn(WIDTH, 6, seed=1),
        "texts": randn(WIDTH, 6, seed=2),
        "scale": torch.tensor([12.5]),
    }
    inputs = [randn(BATCH, num_views, WIDTH, seed=3), randn(BATCH, WIDTH, seed=4)]

    def forward(loss, p, images, texts):
        return loss(images @ p["images"], texts @ p["texts"], p["scale"])

    return parameters, inputs, forward, contrastive, joined_contrastive


def sigmoid_case(num_views):
    parameters, inputs, _, _, _ = contrastive_case(num_views)
    parameters = {**parameters, "bias": torch.tensor([-9.0])}

    def forward(loss, p, images, texts):
        return loss(images @ p["images"], texts @ p["texts"], p["scale"], p["bias"])

    def joined(images, texts, scale, bias):
        texts = F.normalize(texts, dim=-1)
        signs = 2 * torch.eye(len(texts), dtype=texts.dtype) - 1
        losses = [
            -F.logsigmoid(signs * (scale * view @ texts.T + bias)).sum(1).mean()
            for view in F.normalize(images, dim=-1).unbind(1)
        ]
        return sum(losses) / len(losses)

    return parameters, inputs, forward, sigmoid, joined


def simclr_case():
    def forward(loss, p, embeds):
        return loss(embeds @ p["head"], 0.1)

    inputs = [randn(BATCH, 2, WIDTH, seed=6)]
    return {"head": randn(WIDTH, 6, seed=5)}, inputs, forward, simclr, joined_simclr


def byol_case():
    def forward(loss, p, predictions, targets):
        return loss(predictions @ p["predictor"], targets)

    inputs = [randn(BATCH, 2, WIDTH, seed=8), randn(BATCH, 6, seed=9)]
    return {"predictor": randn(WIDTH, 6, seed=7)}, inputs, forward, byol, joined_byol


def total_case():
    parameters = {
        "images": randn(WIDTH, 6, seed=1),
        "texts": randn(WIDTH, 6, seed=2),
        "scale": torch.tensor([12.5]),
        "head": randn(WIDTH, 4, seed=5),
        "predictor": randn(WIDTH, 3, seed=7),
    }
    inputs = [randn(BATCH, 2, WIDTH, seed=3), randn(BATCH, WIDTH, seed=4), randn(BATCH, 3, seed=9)]
    terms = load_recipe(
        SMALL_RECIPE, ["loss.simclr=0.5", "loss.byol=2", "loss.simclr_temperature=0.2"]
    ).terms

    def forward(loss, p, images, texts, targets):
        heads = {"simclr": images @ p["head"], "byol": images @ p["predictor"]}
        output = StudentOutput(images @ p["images"], texts @ p["texts"], p["scale"], heads)
        return loss(terms, output, {"byol": targets})[0]

    def joined(terms, output, targets):
        contrastive = joined_contrastive(
            output.image_embeds, output.text_embeds, output.logit_scale
        )
        simclr = joined_simclr(output.heads["simclr"], 0.2)
        byol = joined_byol(output.heads["byol"], targets["byol"])
        return (contrastive + 0.5 * simclr + 2 * byol, {})

    return parameters, inputs, forward, total, joined


def norm_case():
    """Rows with another mean and spread on every rank: local statistics would be far off."""
    parameters = {"weight": 1 + 0.1 * randn(WIDTH, seed=1), "bias": randn(WIDTH, seed=2)}
    x = randn(BATCH, WIDTH, seed=3)
    x[LOCAL_BATCH:] = 4 * x[LOCAL_BATCH:] + 3
    upstream = randn(BATCH, WIDTH, seed=4)
    # The input's own gradient is seen through a weight in front of the norm.
    parameters["before"] = torch.eye(WIDTH) + 0.3 * randn(WIDTH, WIDTH, seed=5)

    def forward(norm, p, x, upstream):
        return (norm(x @ p["before"], p["weight"], p["bias"]) * upstream).sum(1).mean()

    def global_norm(x, weight, bias):
        module = GlobalBatchNorm(WIDTH)
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, x)

    def joined_norm(x, weight, bias):
        return F.batch_norm(x, None, None, weight, bias, training=True)

    return parameters, [x, upstream], forward, global_norm, joined_norm


CASES = {
    "contrastive, one view": contrastive_case(1),
    "contrastive, two views": contrastive_case(2),
    "sigmoid, two views": sigmoid_case(2),
    "simclr": simclr_case(),
    "byol": byol_case(),
    "all terms": total_case(),
    "GlobalBatchNorm": norm_case(),
}


def run(parameters, inputs, forward, loss):
    parameters = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    value = forward(loss, parameters, *inputs)
    value.backward()
    return {"loss": value.detach(), **{name: p.grad for name, p in parameters.items()}}


def run_cases_on_ranks():
    """Loss and gradients of every case, averaged over the ranks."""
    results = {}
    for case, (parameters, inputs, forward, loss, _) in CASES.items():
        mine = [x.chunk(NUM_RANKS)[dist.get_rank()] for x in inputs]
        results[case] = run(parameters, mine, forward, loss)
        for value in results[case].values():
            dist.all_reduce(value)
            value /= NUM_RANKS
    return results


@pytest.fixture(scope="module")
def on_two_ranks():
    return {}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_averaged_gradients_equal_the_joined_batch(case, run_distributed, on_two_ranks):
    if not on_two_ranks:
        on_two_ranks.update(run_distributed(run_cases_on_ranks, NUM_RANKS)[0])
    parameters, inputs, forward, _, joined = CASES[case]
    parameters = {name: p.double() for name, p in parameters.items()}
    expected = run(parameters, [x.double() for x in inputs], forward, joined)
    assert on_two_ranks[case].keys() == expected.keys()
    for name, actual in on_two_ranks[case].items():
        scale = max(1.0, expected[name].abs().max().item())
        error = (actual.double() - expected[name]).abs().max().item() / scale
        assert error <= 1e-6, f"{name}: {error}"
        assert expected[name].abs().max() > 1e-3


def test_losses_would_differ_if_each_rank_saw_its_own_rows_alone():
    """The cases can tell the global batch from a local one."""
    for case in ("contrastive, two views", "sigmoid, two views", "simclr", "GlobalBatchNorm"):
        parameters, inputs, forward, _, joined = CASES[case]
        whole = run(parameters, inputs, forward, joined)["loss"]
        parts = [[x.chunk(NUM_RANKS)[r] for x in inputs] for r in range(NUM_RANKS)]
        local = sum(run(parameters, part, forward, joined)["loss"] for part in parts) / NUM_RANKS
        assert abs(local - whole) > 0.1


def test_norm_output_of_each_rank_is_its_part_of_the_joined_output(run_distributed):
    x = CASES["GlobalBatchNorm"][1][0]

    def norm_my_rows():
        return GlobalBatchNorm(WIDTH)(x.chunk(NUM_RANKS)[dist.get_rank()]).detach()

    actual = torch.cat(run_distributed(norm_my_rows, NUM_RANKS))
    expected = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


def test_rows_are_gathered_in_rank_order_whatever_their_number(run_distributed):
    counts = [(3, 1, 2), (0, 4, 0), (2, 0, 1)]

    def gather_all():
        rank = dist.get_rank()
        results = []
        for numbers in counts:
            rows = torch.arange(numbers[rank] * 4).view(-1, 2, 2) + 100 * rank
            results.append(
                (distributed.all_gather_rows(rows), distributed.all_gather_rows(rows[:, 0, 0] / 7))
            )
        flags = torch.tensor([rank == 1] * rank, dtype=torch.bool)
        return (
            results,
            distributed.all_gather_rows(flags),
            distributed.rank(),
            distributed.world_size(),
        )

    for rank, (results, flags, own_rank, size) in enumerate(run_distributed(gather_all, 3)):
        assert (own_rank, size) == (rank, 3)
        assert flags.tolist() == [True, False, False]  # none, one and two rows
        for numbers, (rows, fractions) in zip(counts, results, strict=True):
            expected = torch.cat(
                [torch.arange(n * 4).view(-1, 2, 2) + 100 * r for r, n in enumerate(numbers)]
            )
            assert rows.dtype == torch.int64
            assert torch.equal(rows, expected)
            assert torch.equal(fractions, expected[:, 0, 0] / 7)


def test_without_a_process_group_everything_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    for function in (
        distributed.gather_with_grad,
        distributed.sum_with_grad,
        distributed.all_gather_rows,
    ):
        assert torch.equal(function(x), x)


def test_gradient_of_a_gathered_or_summed_tensor_adds_up_over_the_ranks(run_distributed):
    def run_both():
        rank = dist.get_rank()
        x = torch.full((2, 3), float(rank)).requires_grad_()
        gathered = distributed.gather_with_grad(x)
        # Rank r weighs row i with (r + 1) * (i + 1).
        weights = (rank + 1) * torch.arange(1.0, 5.0)[:, None].expand(4, 3)
        (gathered * weights).sum().backward()
        y = torch.tensor([1.0 + rank]).requires_grad_()
        summed = distributed.sum_with_grad(y)
        (summed * (rank + 5)).sum().backward()
        return gathered.detach(), x.grad, summed.detach(), y.grad

    for rank, (gathered, x_grad, summed, y_grad) in enumerate(run_distributed(run_both, 2)):
        assert gathered[:, 0].tolist() == [0, 0, 1, 1]
        own_rows = [1, 2] if rank == 0 else [3, 4]
        assert x_grad[:, 0].tolist() == [3 * row for row in own_rows]  # (1 + 2) * (i + 1)
        assert summed.item() == 3
        assert y_grad.item() == 11  # 5 + 6


def test_gathering_no_rows_at_all_gives_no_rows(run_distributed):
    assert run_distributed(lambda: distributed.all_gather_rows(torch.zeros(0, 3)).shape, 2)[0] == (
        0,
        3,
    )
