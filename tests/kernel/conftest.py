"""What the tests and benchmarks of the kernels share.

Every test of this folder runs on three backends, chosen by where pytest is started. Plain CPU: the
references. TRITON_INTERPRET=1: the Triton kernels, interpreted (test_interpreter.py starts that). A
machine with a CUDA device: the Triton kernels, compiled; there the tests are marked `gpu`.
"""

from collections.abc import Callable

import pytest
import torch

from aclip.kernels.common import INTERPRET

ON_GPU = torch.cuda.is_available() and not INTERPRET
ROWS_FOR_A_GPU = pytest.StashKey[list[str]]()
MEASURED = pytest.StashKey[list[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if ON_GPU and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")


def pytest_terminal_summary(terminalreporter, config):
    for title, key in (("measured", MEASURED), ("benchmark rows that need a GPU", ROWS_FOR_A_GPU)):
        if key in config.stash:
            terminalreporter.section(title)
            terminalreporter.write("\n".join(config.stash[key]) + "\n")


@pytest.fixture
def device() -> str:
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fills what torch.empty and new_empty hand out, so that an element never written is seen."""

    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


@pytest.fixture(autouse=True)
def one_thread_and_fresh_compiler():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


@pytest.fixture(params=["reference", "compiled", "triton"])
def backend(request) -> str:
    """The rows of a benchmark: eager torch, torch.compile of it, and the op as it is used."""
    if request.param != "reference" and not ON_GPU:
        request.config.stash.setdefault(ROWS_FOR_A_GPU, []).append(request.node.nodeid)
        pytest.skip("needs a GPU")
    return request.param


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes per second that a plain device copy of 1 GiB reads and writes; NaN without a GPU."""
    if not ON_GPU:
        return float("nan")
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / device_seconds(lambda: target.copy_(source))


def device_seconds(call: Callable[[], object]) -> float:
    """Median time of one call on the device, between events, with a cold L2 cache."""
    from triton.testing import do_bench

    return do_bench(call, return_mode="median") / 1000


@pytest.fixture
def report(request) -> Callable[[str], None]:
    """Adds a line to what is printed under `measured` when the run ends."""
    return request.config.stash.setdefault(MEASURED, []).append


@pytest.fixture
def measure(request, benchmark, copy_bandwidth, report):
    """Times a call; notes bytes, FLOPs and, on a GPU, device time and share of copy bandwidth.

    The benchmark's own figures are wall-clock time with synchronisation, so they hold the launch
    too; `device_us` in extra_info does not.
    """

    op = request.path.stem.removeprefix("bench_")
    parameters = getattr(request.node, "callspec", None)
    row = parameters.params.get("backend", "") if parameters else ""
    # Rows of one case form a table, whose ratios then compare the backends.
    benchmark.group = f"{op} {request.node.name.replace(row, '', 1)}"

    def run(call: Callable[[], object], num_bytes: int, flops: int) -> None:
        def timed():
            call()
            if ON_GPU:
                torch.cuda.synchronize()

        rounds, warmup = (30, 5) if ON_GPU else (3, 1)
        benchmark.pedantic(timed, rounds=rounds, iterations=1, warmup_rounds=warmup)
        info = {"bytes": num_bytes, "flops": flops, "torch": torch.__version__}
        if ON_GPU:
            seconds = device_seconds(call)
            info |= {
                "card": torch.cuda.get_device_name(),
                "device_us": round(seconds * 1e6, 1),
                "gb_per_s": round(num_bytes / seconds / 1e9, 1),
                "share_of_copy_bandwidth": round(num_bytes / seconds / copy_bandwidth, 3),
            }
        benchmark.extra_info.update(info)
        report(f"{op} {benchmark.name}: {info}")

    return run
