"""How a plan reads: text tables."""

from aclip.cli import show_duration, text_table
from aclip.planning.flops import Flops
from aclip.planning.plan import MODES, Plan

GIB, MIB = 2**30, 2**20
STATE_COLUMNS = (
    "weights",
    "gradients",
    "optimizer",
    "teacher",
    "buffers",
    "heads",
    "logits",
    "sum",
    "host",
)


def report(plan: Plan) -> str:
    """The whole plan as text."""
    parts = (_headline(plan), _flops(plan), _states(plan), _micro_batches(plan), _time(plan))
    return "\n\n".join(parts)


def _headline(plan: Plan) -> str:
    run = plan.run
    trained, frozen = sum(map(sum, run.groups)), sum(run.frozen)
    return (
        f"{run.num_ranks} x {plan.gpu.name}, {plan.ds_config.path}, "
        f"{str(plan.ds_config.dtype).removeprefix('torch.')}, global batch "
        f"{run.step.global_batch_size:,} = {run.num_ranks} x {run.local_batch_size:,}\n"
        f"{trained / 1e6:,.1f} M parameters trained, {frozen / 1e6:,.1f} M frozen, "
        f"{run.teacher / 1e6:,.1f} M in the teacher"
    )


def _flops(plan: Plan) -> str:
    def row(name: str, flops: Flops) -> list[str]:
        numbers = (flops.forward, flops.backward, flops.total)
        return [name, *(f"{number / 1e9:,.2f}" for number in numbers)]

    lines = [["GFLOP a sample", "forward", "backward", "both"]]
    lines += [row(name, flops) for name, flops in plan.flops.items()]
    lines.append(row("sum", sum(plan.flops.values(), Flops())))
    if plan.repeated:
        lines.append(["run again", "", "", f"{plan.repeated / 1e9:,.2f}"])
    return text_table(lines)


def _states(plan: Plan) -> str:
    usable = plan.run.memory_bytes / GIB
    title = f"Memory of a GPU, GiB, without activations ({usable:.1f} of it usable)"
    lines = [["ZeRO", *STATE_COLUMNS]]
    for row in plan.rows:
        states = row.states
        parts = [states.parameters, states.gradients, states.optimizer, row.teacher]
        parts += [states.buffers + states.arriving, row.heads, row.logits]
        numbers = [f"{part / GIB:,.2f}" for part in (*parts, sum(parts), states.host)]
        lines.append([_mark(plan, row.title), *numbers])
    return f"{title}\n{text_table(lines)}"


def _micro_batches(plan: Plan) -> str:
    size = plan.micro_batch_size
    title = (
        "By what both towers recompute: activations, MiB a sample; memory, GiB, at micro-batch "
        f"{size}; the largest micro-batch that fits"
    )
    lines = [["ZeRO"], [""]]
    for mode in MODES:
        lines[0] += [f"{mode}:", "", ""]
        lines[1] += ["activations", "memory", "largest"]
    for row in plan.rows:
        cells = [_mark(plan, row.title)]
        for mode in MODES:
            cells += [
                f"{row.activations[mode] / MIB:,.1f}",
                f"{row.total(size, mode) / GIB:,.1f}",
                f"{row.micro_batches[mode] or 'none'}",
            ]
        lines.append(cells)
    return f"{title}\n{text_table(lines)}"


def _time(plan: Plan) -> str:
    asked, size = plan.ds_config.micro_batch_size, plan.micro_batch_size
    lines = []
    if not plan.own.fitting:
        lines.append(f"ZeRO {plan.own.title} does not fit; the times are as if it did.")
    elif size < asked:
        lines.append(
            f"Micro-batch {asked} does not fit; the times are for train_micro_batch_size_per_gpu "
            f"{size}, {plan.num_micro_steps} micro_steps."
        )
    seconds = plan.num_steps * plan.step_seconds
    images = plan.run.step.global_batch_size / plan.step_seconds
    lines += [
        f"Step: {plan.step_seconds:.3f} s, {images:,.0f} images/s (arithmetic "
        f"{plan.compute_seconds:.3f} s at MFU {plan.mfu:.0%}; {plan.sent_bytes / 1e9:.2f} GB sent "
        f"by each GPU, {plan.communication_seconds:.3f} s at {plan.link_bytes / 1e9:g} GB/s, "
        "overlapped)",
        f"Schedule: {plan.num_steps:,} steps, {show_duration(seconds)}, "
        f"{plan.gpu_hours:,.0f} GPU-hours",
    ]
    return "\n".join(lines)


def _mark(plan: Plan, title: str) -> str:
    return f"{title} <-" if title == plan.own.title else title
