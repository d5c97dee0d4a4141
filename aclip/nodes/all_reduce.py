"""An all-reduce over all ranks, timed; doctor.py starts it on every node."""

import datetime
import statistics
import time

from aclip.cli import MIB, run_reporting_errors
from aclip.machine import check_gpus, own_device_index

MESSAGE_BYTES = 64 * MIB
ROUNDS = 5
TIMEOUT = datetime.timedelta(seconds=60)


def main() -> None:
    # Imported here: torch takes seconds.
    import torch
    import torch.distributed as dist

    check_gpus()
    on_gpu = torch.cuda.is_available()
    device = "cpu"
    if on_gpu:
        device = torch.device("cuda", own_device_index(torch.cuda.device_count()))
    if on_gpu:
        torch.cuda.set_device(device)  # which the barrier reads
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    ranks = dist.get_world_size()
    values = torch.ones(MESSAGE_BYTES // 4, device=device)
    seconds = []
    for _ in range(1 + ROUNDS):
        values.fill_(1.0)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if values[0].item() != ranks:
        raise RuntimeError(f"the all-reduce gave {values[0].item()} instead of {ranks}")
    if dist.get_rank() == 0:
        median = statistics.median(seconds[1:])
        # A ring sends each byte 2 (n - 1) / n times.
        sent = 2 * (ranks - 1) / ranks * MESSAGE_BYTES
        print(
            f"all-reduce over {ranks} ranks: {MESSAGE_BYTES // MIB} MiB in {1000 * median:.1f} ms, "
            f"{sent / median / 1e9:.2f} GB/s sent by each rank",
            flush=True,
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    run_reporting_errors(main)
