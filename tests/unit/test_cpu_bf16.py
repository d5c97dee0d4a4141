"""bf16 products on a CPU without bf16 instructions; in a process of its own, which they change."""

import subprocess
import sys

PREPARE = """
import torch
import torch.nn.functional as F
from aclip.engine import cpu_bf16

torch.manual_seed(0)
torch.set_num_threads(1)
cpu_bf16._has_bf16_instructions = lambda: False

def bf16(*shape):
    return torch.randn(*shape).bfloat16()

def rounded(product, *args):
    return product(*(arg.float() for arg in args)).bfloat16()

def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
"""

PRODUCTS = """
cases = {
    "mm": (torch.mm, (bf16(33, 70), bf16(70, 17))),
    "transposed": (lambda a, b: a @ b.T, (bf16(33, 70), bf16(17, 70))),
    "addmm": (torch.addmm, (bf16(17), bf16(33, 70), bf16(70, 17))),
    "bmm": (torch.bmm, (bf16(3, 9, 70), bf16(3, 70, 5))),
    "baddbmm": (torch.baddbmm, (bf16(3, 9, 5), bf16(3, 9, 70), bf16(3, 70, 5))),
    "linear": (F.linear, (bf16(4, 9, 70), bf16(17, 70))),
    "linear with bias": (F.linear, (bf16(4, 9, 70), bf16(17, 70), bf16(17))),
    "attention": (F.scaled_dot_product_attention, tuple(bf16(2, 3, 19, 16) for _ in range(3))),
    "causal attention": (causal, tuple(bf16(2, 3, 19, 16) for _ in range(3))),
}
expected = {name: rounded(product, *args) for name, (product, args) in cases.items()}
assert cpu_bf16.use_fp32_products_if_faster() is True
assert cpu_bf16.use_fp32_products_if_faster() is True  # twice is once
for name, (product, args) in cases.items():
    actual = product(*args)
    assert actual.dtype == torch.bfloat16, name
    assert torch.equal(actual, expected[name]), name
a, b, c = bf16(4, 8), bf16(8, 5), bf16(5)
scaled = torch.addmm(c.float(), a.float(), b.float(), beta=0.5, alpha=2.0).bfloat16()
assert torch.equal(torch.addmm(c, a, b, beta=0.5, alpha=2.0), scaled)
"""

GRADIENTS = """
def gradients(product, args, upstream):
    leaves = [arg.detach().clone().requires_grad_() for arg in args]
    product(*leaves).backward(upstream)
    return [leaf.grad for leaf in leaves]

linear = (bf16(33, 70), bf16(17, 70), bf16(17))
attention = tuple(bf16(2, 3, 19, 16) for _ in range(3))
cases = [
    ("linear", F.linear, linear, bf16(33, 17)),
    ("bmm", torch.bmm, (bf16(3, 9, 70), bf16(3, 70, 5)), bf16(3, 9, 5)),
    ("attention", F.scaled_dot_product_attention, attention, bf16(2, 3, 19, 16)),
    ("causal attention", causal, attention, bf16(2, 3, 19, 16)),
]
expected = {
    name: gradients(product, [a.float() for a in args], upstream.float())
    for name, product, args, upstream in cases
}
cpu_bf16.use_fp32_products_if_faster()
for name, product, args, upstream in cases:
    for index, gradient in enumerate(gradients(product, args, upstream)):
        reference = expected[name][index]
        assert gradient.dtype == torch.bfloat16, name
        error = (gradient.float() - reference).abs().max() / reference.abs().max()
        # A rounding to bf16 is 2^-9 of a value; attention's backward reads its rounded output too.
        assert error <= 2**-7, (name, index, error)
x, weight = linear[:2]
upstream = cases[0][3]
actual = gradients(F.linear, linear, upstream)
assert torch.equal(actual[0], rounded(torch.mm, upstream, weight))
assert torch.equal(actual[1], rounded(lambda g, x: g.T @ x, upstream, x))
"""

FP32 = """
def everything(dtype):
    torch.manual_seed(1)
    a, b, c = (torch.randn(3, 8, 8, dtype=dtype) for _ in range(3))
    return [
        a[0] @ b[0],
        torch.addmm(c[0], a[0], b[0], beta=0.5, alpha=2),
        a @ b,
        torch.baddbmm(c, a, b),
        F.scaled_dot_product_attention(a[None], b[None], c[None], is_causal=True),
    ]

before = [everything(dtype) for dtype in (torch.float32, torch.float64)]
cpu_bf16.use_fp32_products_if_faster()
after = [everything(dtype) for dtype in (torch.float32, torch.float64)]
for old, new in zip(sum(before, []), sum(after, [])):
    assert old.dtype == new.dtype
    assert torch.equal(old, new)
"""

WITH_INSTRUCTIONS = """
cpu_bf16._has_bf16_instructions = lambda: True
assert cpu_bf16.use_fp32_products_if_faster() is False
assert cpu_bf16._library is None
"""


def run(script):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PREPARE + script], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_products_and_gradients_are_rounded_fp32_ones_and_fp32_is_untouched():
    run(FP32 + PRODUCTS + GRADIENTS)  # one process: importing torch is what takes the time


def test_nothing_changes_on_a_cpu_with_bf16_instructions():
    run(WITH_INSTRUCTIONS)
