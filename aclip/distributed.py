"""Rank, world size, what the ranks say as one, and the collectives that losses and evaluation need.

Without an initialised process group everything is the identity, so that losses run in one process.
"""

import json
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aclip.errors import ConfigError, DataError, NotWritten, PortInUse
from aclip.machine import ranks_of_machine, usable_cores

TASKS = (
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpiexec", "PMI_SIZE", "PMI_RANK"),
)
"""Who starts a command several times, and the variables that hold how often and which one it is."""
WAIT_FOR_RANK_0 = timedelta(minutes=30)
_stores: list[dist.TCPStore] = []
"""This process's first store: rank 0's serves the other ranks as long as rank 0 lives."""


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def say(text: str) -> None:
    """Prints lines for the user once for all ranks: on rank 0, also before the ranks have met."""
    # Before there is a process group, the launcher has said which rank this is.
    here = rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if here == 0:
        print(text, flush=True)


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.num_rows = x.shape[0]
        gathered = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
        dist.all_gather_single(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Every rank's loss reads this rank's rows, so their gradients add up.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.narrow(0, rank() * ctx.num_rows, ctx.num_rows)


class _SumWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def gather_with_grad(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order; the gradient flows back to the rank that owns a row.

    The backward pass sums over ranks. With each rank's loss the mean over its own rows and
    gradients averaged over ranks (as DeepSpeed does), that is the gradient of the global mean.

    Args:
        x: (n, ...) float, the same shape on every rank.

    Returns:
        (world_size * n, ...), same dtype.
    """
    return _GatherWithGrad.apply(x) if world_size() > 1 else x


def sum_with_grad(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks, elementwise; the backward pass sums over ranks too."""
    return _SumWithGrad.apply(x) if world_size() > 1 else x


def all_gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, without gradient; the number of rows may differ by rank.

    Args:
        x: (n_r, ...), equal in everything but n_r on every rank.

    Returns:
        (sum of n_r, ...), same dtype.
    """
    if world_size() == 1:
        return x
    counts = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
    counts[rank()] = x.shape[0]
    dist.all_reduce(counts)
    counts = counts.tolist()
    if max(counts) == 0:
        return x
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: x.shape[0]] = x
    gathered = x.new_empty(world_size() * max(counts), *x.shape[1:])
    dist.all_gather_single(gathered, padded)
    parts = gathered.split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def from_rank_0(value: Any) -> Any:
    """Rank 0's value on every rank; what the others pass is not looked at."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """The value of each rank, in rank order; a collective."""
    if world_size() == 1:
        return [value]
    every = [None] * world_size()
    dist.all_gather_object(every, value)
    return every


def decided_by_rank_0(decide: Callable[[], Any], name: str) -> Any:
    """What rank 0 finds out where the others can't or must not look, before the ranks have met.

    Args:
        decide: is called on rank 0 alone; its result is JSON-compatible.
        name: tells this decision from others.

    Raises:
        ConfigError: what `decide` raises, with the same sentence on every rank; on the other ranks
            also if rank 0 has ended without a word for them.
    """
    if int(os.environ["WORLD_SIZE"]) == 1:
        return decide()
    is_first = os.environ["RANK"] == "0"
    kinds = {kind.__name__: kind for kind in (DataError, NotWritten, ConfigError)}
    try:
        store = _store(is_first)
        if not is_first:
            answer = json.loads(store.get(f"decided/{name}"))
    except (OSError, RuntimeError) as error:
        if is_first and "EADDRINUSE" in str(error):
            raise port_in_use() from None
        raise ConfigError(
            f"rank 0 can't be asked ({' '.join(str(error).split())[:200]}); read what it has said, "
            "and check that this node reaches MASTER_ADDR"
        ) from None
    if not is_first:
        if "error" in answer:
            raise kinds[answer["kind"]](answer["error"])
        return answer["value"]
    try:
        value = decide()
    except ConfigError as error:
        # Of a kind that only rank 0 tells apart, the others raise what it is one of.
        kind = next(name for name, kind in kinds.items() if isinstance(error, kind))
        failure = {"error": str(error), "kind": kind}
        store.set(f"decided/{name}", json.dumps(failure))
        raise
    store.set(f"decided/{name}", json.dumps({"value": value}))
    return value


def _store(is_master: bool) -> dist.Store:
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if not _stores:
        # The process group's own store, at the same port, then shares this one's server.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=is_master,
            timeout=WAIT_FOR_RANK_0,
            wait_for_workers=False,
            multi_tenant=True,
        )
        _stores.append(store)
    return _stores[0]


def port_in_use() -> PortInUse:
    """The error of rank 0 where another process listens at the port at which the ranks meet."""
    return PortInUse(
        f"MASTER_PORT is {os.environ.get('MASTER_PORT')}, which another process of this machine "
        "uses, perhaps another run; give the launcher a free one in front of the script, e.g. "
        "deepspeed --master_port 29501 launch/pretrain.py"
    )


def default_to_one_rank() -> None:
    """Without a launcher the script is its own single rank.

    Raises:
        ConfigError: somebody has started it several times, but not as ranks that know each other.
    """
    for starter, size, number in TASKS:
        if "RANK" not in os.environ and int(os.environ.get(size) or 1) > 1:
            raise ConfigError(
                f"{size} is {os.environ[size]}: {starter} has started this command as task "
                f"{os.environ.get(number, 'unknown')} of {os.environ[size]}, but no task knows its "
                "rank; under Slurm use sbatch with launch/slurm.sbatch, elsewhere start it once: "
                f"deepspeed launch/{Path(sys.argv[0]).name}, or launch/multinode.sh"
            )
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    # Ranks that share cores lose more by waiting for each other than they gain from threads.
    limit_threads(ranks_of_machine() or int(os.environ["WORLD_SIZE"]))


def limit_threads(processes: int = 1) -> None:
    """Lets torch compute with the cores that this process may use, of which its own count takes
    no quota into account; OMP_NUM_THREADS is left to decide where it is set.

    Args:
        processes: how many processes share these cores.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // processes))
