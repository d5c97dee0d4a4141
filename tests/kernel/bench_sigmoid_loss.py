"""sigmoid_loss forward and backward against the plain formula."""

import torch
import torch.nn.functional as F

from aclip.kernels.sigmoid_loss import sigmoid_loss, sigmoid_loss_reference

ON_GPU = torch.cuda.is_available()
ROWS, COLUMNS, WIDTH, CHUNK = (4096, 32768, 512, 1024) if ON_GPU else (512, 4096, 512, 128)


def plain_loss(rows, columns, logit_scale, logit_bias):
    logits = logit_scale * rows @ columns.T + logit_bias
    signs = 2 * torch.eye(*logits.shape, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum(1).mean()


def make_inputs(device):
    rows = F.normalize(torch.randn(ROWS, WIDTH, device=device), dim=1)
    columns = F.normalize(torch.randn(COLUMNS, WIDTH, device=device), dim=1)
    numbers = torch.full((1,), 10.0, device=device), torch.full((1,), -10.0, device=device)
    return [tensor.requires_grad_() for tensor in (rows, columns, *numbers)]


def bench_forward_and_backward(backend, measure, device):
    inputs = make_inputs(device)
    plain = torch.compile(plain_loss) if backend == "compiled" else plain_loss

    def call():
        loss = sigmoid_loss(*inputs, 0, CHUNK) if backend == "triton" else plain(*inputs)
        torch.autograd.grad(loss, inputs)

    measure(call, 4 * 5 * ROWS * COLUMNS, flops=6 * ROWS * COLUMNS * WIDTH)


def bench_chunked_reference(measure, device):
    inputs = [tensor.detach() for tensor in make_inputs(device)]

    def call():
        sigmoid_loss_reference(*inputs, 0, CHUNK, True, True)

    measure(call, 4 * 5 * ROWS * COLUMNS, flops=6 * ROWS * COLUMNS * WIDTH)
