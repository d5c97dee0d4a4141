"""A rank of a scaling measurement; scaling.py starts it on every slot."""

import json
import os
import time

from aclip.benchmarks.spans import covered
from aclip.machine import check_gpus

SPEC = "ACLIP_SCALING"
RESULT = "scaling: "
WARM_UP = 2
PROFILED = "profiled step"


def main() -> None:
    # Imported here, since they take seconds and scaling.py only needs this module's names.
    import torch
    import torch.distributed as dist

    from aclip.benchmarks.host_pages import own_pages
    from aclip.benchmarks.peak_memory import peak_bytes
    from aclip.config.ds_config import read_ds_config
    from aclip.config.recipe_file import load_recipe
    from aclip.data.batch import join
    from aclip.data.synthetic import synthetic_batch
    from aclip.engine.process_group import init_distributed
    from aclip.training.stepper import Stepper

    check_gpus()
    spec = json.loads(os.environ[SPEC])
    recipe = load_recipe(spec["recipe"], spec["overrides"])
    world_size = int(os.environ["WORLD_SIZE"])
    global_batch_size = recipe.train.global_batch_size
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    device = init_distributed()
    ds_config = read_ds_config(spec["ds_config"], global_batch_size, world_size)
    batch = synthetic_batch(recipe, global_batch_size // world_size)
    batch = join([batch], pin=device.type == "cuda")  # as the loader hands it over
    momentum = recipe.average_momentum

    def step() -> None:
        stepper.step(batch, recipe.optimizer.lr, momentum)

    with own_pages():
        stepper = Stepper(recipe, ds_config, device)
        for _ in range(WARM_UP):
            step()
        peak = peak_bytes(step, device)
    for _ in range(WARM_UP):
        step()
    _synchronise(device)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(spec["steps"]):
        step()
    _synchronise(device)
    dist.barrier()
    seconds = time.perf_counter() - start
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with (
        torch.profiler.profile(activities=activities) as profile,
        torch.profiler.record_function(PROFILED),
    ):
        step()
        _synchronise(device)
    communication = communication_share(profile.profiler.kineto_results.events())
    most = torch.tensor([float(peak), communication], device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        result = {
            "images_per_second": spec["steps"] * global_batch_size / seconds,
            "memory_bytes": most[0].item(),
            "communication": most[1].item(),
        }
        print(f"{RESULT}{json.dumps(result)}", flush=True)


def communication_share(events) -> float:
    """Share of the profiled step during which a collective ran: NCCL's kernels, or gloo's work."""
    step = next(event for event in events if event.name() == PROFILED)
    begin, end = step.start_ns(), step.start_ns() + step.duration_ns()
    spans = []
    for event in events:
        name = event.name()
        if name.startswith("gloo:") or name.startswith("ncclDevKernel"):
            first, last = event.start_ns(), event.start_ns() + event.duration_ns()
            if last > begin and first < end:
                spans.append((max(first, begin), min(last, end)))
    return covered(spans) / (end - begin)


def _synchronise(device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
