"""contrastive_loss forward and backward: time, and peak memory against the plain formula."""

import re
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from aclip.kernels.contrastive_loss import contrastive_loss, contrastive_loss_reference

ON_GPU = torch.cuda.is_available()
ROWS, COLUMNS, WIDTH, CHUNK = (4096, 32768, 512, 1024) if ON_GPU else (512, 4096, 512, 128)
MEMORY_SIZE, MEMORY_CHUNK = 16384, 1024


def plain_loss(rows, columns, logit_scale):
    labels = torch.arange(rows.shape[0], device=rows.device)
    return F.cross_entropy(logit_scale * rows @ columns.T, labels)


def make_inputs(num_rows, num_columns, device):
    rows = F.normalize(torch.randn(num_rows, WIDTH, device=device), dim=1)
    columns = F.normalize(torch.randn(num_columns, WIDTH, device=device), dim=1)
    inputs = rows, columns, torch.full((1,), 14.3, device=device)
    return [tensor.requires_grad_() for tensor in inputs]


def bench_forward_and_backward(backend, measure, device):
    inputs = make_inputs(ROWS, COLUMNS, device)
    plain = torch.compile(plain_loss) if backend == "compiled" else plain_loss

    def call():
        loss = contrastive_loss(*inputs, 0, CHUNK) if backend == "triton" else plain(*inputs)
        torch.autograd.grad(loss, inputs)

    measure(call, 4 * 6 * ROWS * COLUMNS, flops=6 * ROWS * COLUMNS * WIDTH)


def bench_chunked_reference(measure, device):
    inputs = [tensor.detach() for tensor in make_inputs(ROWS, COLUMNS, device)]

    def call():
        contrastive_loss_reference(*inputs, 0, CHUNK, True, True)

    measure(call, 4 * 6 * ROWS * COLUMNS, flops=6 * ROWS * COLUMNS * WIDTH)


def bench_peak_memory(benchmark, report):
    """Peak memory over the inputs' at 16,384 x 16,384, each formula in a process of its own."""
    command = [sys.executable, __file__]

    def peak(formula):
        run = subprocess.run([*command, formula], capture_output=True, text=True, check=True)
        return int(run.stdout)

    chunked = benchmark.pedantic(peak, args=("chunked",), rounds=1)
    plain = peak("plain")
    benchmark.extra_info.update(chunked_bytes=chunked, plain_bytes=plain)
    report(
        f"peak of forward + backward at {MEMORY_SIZE} x {MEMORY_SIZE}, D = {WIDTH}: "
        f"plain {plain / 2**20:.0f} MiB, chunked {chunked / 2**20:.0f} MiB "
        f"({chunked / plain:.1%})"
    )
    assert chunked < 0.25 * plain


def main(formula):
    """Prints the peak of one formula in bytes."""
    device = "cuda" if ON_GPU else "cpu"
    inputs = make_inputs(MEMORY_SIZE, MEMORY_SIZE, device)
    before = reset_peak()
    loss = (
        contrastive_loss(*inputs, 0, MEMORY_CHUNK) if formula == "chunked" else plain_loss(*inputs)
    )
    loss.backward()
    print(peak_bytes() - before)


def reset_peak():
    """Forgets the peak so far, which imports and inputs have made, and returns what is in use."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes():
    if ON_GPU:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1])
