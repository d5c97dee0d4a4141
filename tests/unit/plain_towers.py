"""A tower beside the library's own forward of the same weights."""

import torch


def compare(actual, expected, tower, plain):
    """The outputs are equal, and so is the gradient of each of the tower's parameters."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(expected)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = dict(plain.named_parameters())
    compared = 0
    for name, parameter in tower.named_parameters():
        expected_gradient = gradients[name].grad
        if expected_gradient is None:
            assert parameter.grad is None or not parameter.grad.any()
            continue
        # A key bias has no gradient but rounding: softmax does not see it. Hence the floor.
        scale = expected_gradient.abs().max()
        assert (parameter.grad - expected_gradient).abs().max() <= 1e-4 * scale + 1e-6, name
        compared += 1
    assert compared > 5
