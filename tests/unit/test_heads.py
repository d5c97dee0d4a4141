"""Heads in one process: BatchNorm is torch's, the logit scale is exact under bf16 parameters."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aclip.method.losses.heads import GlobalBatchNorm, LogitScale, mlp_head


def random_norm(width):
    norm = GlobalBatchNorm(width)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("rows, width", [(2, 3), (7, 1), (64, 33)])
def test_global_batch_norm_equals_batch_norm_in_training_mode(rows, width):
    torch.manual_seed(rows)
    norm = random_norm(width)
    x = (3 * torch.randn(rows, width) - 1).requires_grad_()
    upstream = torch.randn(rows, width)
    actual = norm(x)
    gradients = torch.autograd.grad((actual * upstream).sum(), (x, norm.weight, norm.bias))

    inputs = [t.detach().double().requires_grad_() for t in (x, norm.weight, norm.bias)]
    expected = F.batch_norm(inputs[0], None, None, inputs[1], inputs[2], training=True, eps=1e-5)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), inputs)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4)


def test_global_batch_norm_keeps_its_digits_far_from_zero():
    torch.manual_seed(0)
    x = 1000 + torch.randn(256, 4)
    expected = F.batch_norm(x.double(), None, None, training=True)
    # fp32 has a step of 6e-5 at 1000; the mean of squares would leave no digit of the variance.
    torch.testing.assert_close(GlobalBatchNorm(4)(x).double(), expected, rtol=0, atol=1e-3)


def test_global_batch_norm_ignores_eval_mode():
    x = torch.randn(8, 4)
    norm = random_norm(4)
    torch.testing.assert_close(norm.eval()(x), norm.train()(x))


def test_global_batch_norm_of_bf16_rounds_once_at_the_end():
    torch.manual_seed(0)
    norm = random_norm(16).bfloat16()
    x = torch.randn(32, 16).bfloat16()
    expected = F.batch_norm(
        x.float(), None, None, norm.weight.float(), norm.bias.float(), training=True
    )
    actual = norm(x)
    assert actual.dtype == torch.bfloat16
    # Half a step of bf16, and a hair for values that lie between two of its numbers.
    torch.testing.assert_close(actual.float(), expected, rtol=2**-8 + 1e-5, atol=1e-6)


def test_head_is_linear_norm_relu_and_ends_linear_without_biases():
    head = mlp_head([4, 5, 6, 3])
    kinds = [type(layer) for layer in head]
    block = [nn.Linear, GlobalBatchNorm, nn.ReLU]
    assert kinds == [*block, *block, nn.Linear]
    linears = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linears] == [(5, 4), (6, 5), (3, 6)]
    assert all(layer.bias is None for layer in linears)


def test_head_equals_the_functional_formula():
    torch.manual_seed(0)
    head, x = mlp_head([4, 5, 3]), torch.randn(9, 4)
    hidden = F.relu(F.batch_norm(x @ head[0].weight.T, None, None, training=True))
    torch.testing.assert_close(head(x), hidden @ head[-1].weight.T, rtol=1e-5, atol=1e-5)


def test_logit_scale_starts_at_the_published_value():
    scale = LogitScale()
    assert scale.log_logit_scale.shape == (1,)
    assert scale().item() == pytest.approx(1 / 0.07, rel=1e-6)


def test_logit_scale_without_exact_value_is_the_exponential_of_its_parameter():
    scale = LogitScale()
    with torch.no_grad():
        scale.log_logit_scale.fill_(2.0)
    (3 * scale()).backward()
    assert scale().item() == pytest.approx(math.exp(2.0), rel=1e-6)
    assert scale.log_logit_scale.grad.item() == pytest.approx(3 * math.exp(2.0), rel=1e-6)


def test_logit_scale_under_bf16_takes_the_exact_value_and_gives_the_parameter_its_gradient():
    scale = LogitScale().bfloat16()
    with torch.no_grad():
        scale.log_logit_scale.fill_(4.59375)  # the bf16 number next to 4.6, 98.9 as a scale
    scale.exact = torch.tensor([4.6])
    value = scale()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(math.exp(4.6), rel=1e-6)
    (2 * value).sum().backward()
    gradient = scale.log_logit_scale.grad
    assert gradient.dtype == torch.bfloat16
    assert gradient.item() == pytest.approx(2 * math.exp(4.6), rel=2**-8)
