"""How long a checkpoint stops a run, and how long it is written, under every ZeRO stage.

The ranks are processes of this machine. They stand still while a checkpoint is written, which makes
the write as fast as it can be and the pause's share of it as large.
"""

import argparse
import gc
import json
import os
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aclip.cli import MIB, text_table
from aclip.errors import ConfigError
from aclip.files import check_writable, write_whole

STAGES = (0, 1, 2, 3)
BATCH_SIZE = 4  # of a rank; nothing but the optimizer's state is wanted of its step


@dataclass(frozen=True)
class Saves:
    """What rank 0 measured, in seconds, one number for each save.

    Attributes:
        num_ranks, stage: under what.
        size: bytes of the checkpoint.
        pauses: how long the training thread was held up; cpu: its CPU time of that.
        writes: from then on until the checkpoint was published, hashed and synced.
        copies: a plain copy of as many bytes, once each, into memory that was in use before.
    """

    num_ranks: int
    stage: int
    size: int
    pauses: list[float]
    cpu: list[float]
    writes: list[float]
    copies: list[float]

    @property
    def share(self) -> float:
        """The pause over the write, median of the saves but the first."""
        return statistics.median(self.shares()[1:])

    def shares(self) -> list[float]:
        return [pause / write for pause, write in zip(self.pauses, self.writes, strict=True)]


def benchmark_saving(arguments: argparse.Namespace) -> int:
    """Runs `launch/benchmark.py --saving`; returns the exit status.

    Raises:
        ConfigError: a number below 1, a recipe that can't be read, a folder that can't be written.
    """
    if min(arguments.saving) < 1 or arguments.rounds < 1:
        raise ConfigError(
            f"--saving is {min(arguments.saving)} or --rounds is {arguments.rounds}; give 1 or more"
        )
    import torch  # which takes seconds

    most = max(arguments.saving)
    if torch.cuda.is_available() and most > torch.cuda.device_count():
        raise ConfigError(
            f"--saving is {most}, but this machine has {torch.cuda.device_count()} GPUs; give as "
            "many ranks as GPUs or fewer"
        )
    out = Path(arguments.saved_in)
    check_writable(out, "--saved_in")
    if arguments.json:
        check_writable(Path(arguments.json).absolute().parent, "the folder of --json")
    rows = [
        saves
        for recipe in arguments.recipes
        for num_ranks in arguments.saving
        for saves in measure(recipe, arguments.set, num_ranks, arguments.rounds, out)
    ]
    print(format_table(rows))
    if arguments.json:
        write_whole(Path(arguments.json), json.dumps([asdict(row) for row in rows], indent=1))
    return 0


def measure(
    recipe: str, overrides: list[str], num_ranks: int, rounds: int, out: Path
) -> list[Saves]:
    """Saves a recipe's state on so many ranks, under each ZeRO stage in turn.

    Args:
        rounds: saves under each stage, besides the first one.
        out: the checkpoints go to this folder's disk, and are removed.
    """
    # Imported here, since this takes seconds.
    import torch.multiprocessing as multiprocessing

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with TemporaryDirectory(dir=out) as folder:
        arguments = (num_ranks, port, recipe, overrides, rounds, Path(folder))
        multiprocessing.spawn(_run_rank, arguments, num_ranks)
        return [Saves(**each) for each in json.loads((Path(folder) / "saves.json").read_text())]


def _run_rank(
    rank: int,
    num_ranks: int,
    port: int,
    recipe_name: str,
    overrides: list[str],
    rounds: int,
    folder: Path,
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    os.environ.update(LOCAL_WORLD_SIZE=str(num_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    from aclip.config.recipe_file import load_recipe
    from aclip.engine.process_group import init_distributed

    torch.set_num_threads(1)
    batch_size = BATCH_SIZE * num_ranks
    given = [*overrides, f"train.global_batch_size={batch_size}", "data.train=demo"]
    recipe = load_recipe(recipe_name, given)
    device = init_distributed()
    found = [_save_often(recipe, stage, device, num_ranks, rounds, folder) for stage in STAGES]
    if rank == 0:
        write_whole(folder / "saves.json", json.dumps(found))
    torch.distributed.destroy_process_group()


def _save_often(recipe, stage: int, device, num_ranks: int, rounds: int, folder: Path) -> dict:
    """Saves of one stage, as the arguments of Saves."""
    import torch.distributed as dist

    from aclip.config.ds_config import read_ds_config
    from aclip.config.sections import TrainConfig
    from aclip.data.batch import join
    from aclip.data.synthetic import synthetic_batch
    from aclip.training.saver import Saver
    from aclip.training.stepper import Stepper

    ds_config = read_ds_config(
        f"ds_configs/zero{stage}.json", recipe.train.global_batch_size, num_ranks
    )
    stepper = Stepper(recipe, ds_config, device)
    batch = join([synthetic_batch(recipe, BATCH_SIZE)], pin=device.type == "cuda")
    stepper.step(batch, recipe.optimizer.lr, None if stepper.teacher is None else 0.99)
    root = folder / f"zero{stage}"
    saver = Saver(root, stepper.engine, stepper.teacher, TrainConfig(keep_checkpoints=1))
    saver.prepare()
    time.sleep(2)  # as good as the 20 minutes that a run has until its first checkpoint
    found: dict[str, Any] = {"pauses": [], "cpu": [], "writes": [], "copies": []}
    for number in range(1, rounds + 2):
        _synchronise(device)
        dist.barrier()
        start, start_cpu = time.perf_counter(), time.thread_time()
        saver.save({"samples": number, "step": number}, (number, []))
        paused, cpu = time.perf_counter() - start, time.thread_time() - start_cpu
        if not saver.is_saved((number, [])):
            raise RuntimeError("the checkpoint was not written; see above")
        found["pauses"].append(paused)
        found["cpu"].append(cpu)
        found["writes"].append(time.perf_counter() - start - paused)
    saver.close()
    del saver, stepper
    gc.collect()
    if dist.get_rank() == 0:
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        found["copies"] = [_copy_seconds(size) for _ in range(rounds)]
        found |= {"num_ranks": num_ranks, "stage": stage, "size": size}
    dist.barrier()
    return found


def _copy_seconds(size: int) -> float:
    """How long a plain copy takes of so many bytes, in parts, between pages that are in use."""
    import torch

    part = min(size, 1 << 28)
    source, target = torch.zeros(part, dtype=torch.uint8), torch.ones(part, dtype=torch.uint8)
    start = time.perf_counter()
    target.copy_(source)
    return (time.perf_counter() - start) * size / part


def _synchronise(device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def format_table(rows: list[Saves]) -> str:
    """The rows as text."""
    lines = [
        ["ranks", "ZeRO", "MiB", "pause, s", "of it CPU", "write, s", "pause / write", "first"]
        + ["plain copy, s"]
    ]
    for row in rows:
        median = [
            f"{statistics.median(values[1:]):.3f}" for values in (row.pauses, row.cpu, row.writes)
        ]
        lines.append(
            [str(row.num_ranks), str(row.stage), f"{row.size / MIB:,.0f}", *median]
            + [f"{row.share:.1%}", f"{row.shares()[0]:.1%}"]
            + [f"{statistics.median(row.copies):.3f}"]
        )
    return text_table(lines)
