"""How a plan reads: text tables."""

from aclip.cli import GIB, MIB, show_duration, text_table
from aclip.data.lanes.order import describe_rest
from aclip.planning.measure_step import MODES
from aclip.planning.meter import Flops, add_up
from aclip.planning.plan import Plan

TITLES = {"image": "image tower", "text": "text tower"}
"""What parts are called in the table; any other part is shown by its name."""
STATE_COLUMNS = (
    "weights",
    "gradients",
    "optimizer",
    "teacher",
    "buffers",
    "heads",
    "losses",
    "batches",
    "sum",
    "host",
)


def report(plans: list[Plan]) -> str:
    """The plans of a run's stages as text, and what they add up to."""
    if len(plans) == 1:
        return _report(plans[0])
    parts = [
        f"Stage {number} of {len(plans)}: {_report(plan)}"
        for number, plan in enumerate(plans, start=1)
    ]
    return "\n\n".join([*parts, _sum(plans)])


def _report(plan: Plan) -> str:
    parts = (_headline(plan), _flops(plan), _states(plan), _micro_batches(plan), _time(plan))
    return "\n\n".join(parts)


def _sum(plans: list[Plan]) -> str:
    """What each stage takes, and all of them together."""

    def row(name: str, some: list[Plan]) -> list[str]:
        samples = sum(each.num_steps * each.workload.global_batch_size for each in some)
        return [
            name,
            f"{sum(each.num_steps for each in some):,}",
            f"{samples:,}",
            f"{sum(each.flops for each in some) / 1e18:,.3g}",
            show_duration(sum(each.num_steps * each.step_seconds for each in some)),
            f"{sum(each.gpu_hours for each in some):,.0f}",
        ]

    rows = [["", "steps", "samples", "EFLOP", "time", "GPU-hours"]]
    rows += [row(f"stage {number}", [each]) for number, each in enumerate(plans, start=1)]
    return text_table([*rows, row("run", plans)])


def _headline(plan: Plan) -> str:
    load = plan.workload
    trained, frozen = sum(map(sum, load.groups)), sum(load.frozen)
    return (
        f"{load.num_ranks} x {plan.gpu.name}, {plan.ds_config.path}, "
        f"{str(plan.ds_config.dtype).removeprefix('torch.')}, global batch "
        f"{load.global_batch_size:,} = {load.num_ranks} x {load.local_batch_size:,}\n"
        f"{trained / 1e6:,.1f} M parameters trained, {frozen / 1e6:,.1f} M frozen, "
        f"{load.teacher / 1e6:,.1f} M in the teacher"
    )


def _flops(plan: Plan) -> str:
    def row(name: str, flops: Flops) -> list[str]:
        numbers = (flops.forward, flops.backward, flops.total)
        return [name, *(f"{number / 1e9:,.2f}" for number in numbers)]

    lines = [["GFLOP a sample", "forward", "backward", "both"]]
    parts = plan.measured.flops
    lines += [row(TITLES.get(name, name), flops) for name, flops in parts.items()]
    lines.append(row("sum", add_up(parts)))
    if plan.repeated_flops:
        lines.append(["run again", "", "", f"{plan.repeated_flops / 1e9:,.2f}"])
    reasons = [plan.keep_ratio] if plan.keep_ratio else []
    if plan.teaching_share < 1:
        share = f"{plan.teaching_share:.0%}"
        reasons.append(f"the teacher scores its view in {share} of the steps")
    note = f"Averages over the run: {', and '.join(reasons)}. So are the times below."
    if plan.keep_ratio:
        note += " Memory is that of the steps that keep the most."
    return text_table(lines) + (f"\n{note}" if reasons else "")


def _states(plan: Plan) -> str:
    usable = plan.memory_bytes / GIB
    title = f"Memory of a GPU, GiB, without activations ({usable:.1f} of it usable)"
    lines = [["ZeRO", *STATE_COLUMNS]]
    for row in plan.rows:
        memory, states = row.memory, row.memory.states
        parts = [states.parameters, states.gradients, states.optimizer, memory.teacher]
        parts += [states.buffers + states.arriving, memory.heads, memory.losses, memory.batches]
        numbers = [f"{part / GIB:,.2f}" for part in (*parts, sum(parts), states.host)]
        lines.append([_mark(plan, row.title), *numbers])
    copies = plan.workload.checkpoint
    note = (
        f"Checkpoints of {copies.size / GIB:,.2f} GiB take {copies.pinned / GIB:,.2f} GiB more of "
        "the host's memory on rank 0, pinned in blocks of powers of two and kept between saves."
    )
    return f"{title}\n{text_table(lines)}\n{note}"


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
                f"{row.kept[mode] / MIB:,.1f}",
                f"{row.peak(size, mode) / GIB:,.1f}",
                f"{row.largest[mode] or 'none'}",
            ]
        lines.append(cells)
    return f"{title}\n{text_table(lines)}"


def _time(plan: Plan) -> str:
    asked, size = plan.ds_config.micro_batch_size, plan.micro_batch_size
    lines = []
    if not plan.own.largest[None]:
        lines.append(f"ZeRO {plan.own.title} does not fit; the times are as if it did.")
    elif size < asked:
        lines.append(
            f"Micro-batch {asked} does not fit; the times are for train_micro_batch_size_per_gpu "
            f"{size}, {plan.num_micro_steps} micro_steps."
        )
    seconds = plan.num_steps * plan.step_seconds
    images = plan.workload.global_batch_size / plan.step_seconds
    lines += [
        f"Step: {plan.step_seconds:.3f} s, {images:,.0f} images/s, MFU {plan.mfu:.0%} "
        f"({_compute(plan)}; {plan.sent_bytes / 1e9:.2f} GB sent by each GPU, "
        f"{plan.communication_seconds:.3f} s at {plan.link_bytes / 1e9:g} GB/s, overlapped)",
        *_host_bound(plan),
        f"Schedule: {plan.num_steps:,} steps, {show_duration(seconds)}, "
        f"{plan.gpu_hours:,.0f} GPU-hours",
        f"Data: {describe_rest(plan.num_samples, plan.workload.global_batch_size)}",
        *_kept_scores(plan),
    ]
    return "\n".join(lines)


def _compute(plan: Plan) -> str:
    """What the step's time comes from."""
    if plan.stated_mfu is not None:
        return f"arithmetic {plan.compute_seconds:.3f} s at --mfu {plan.stated_mfu:g}"
    whole = plan.time.whole
    return (
        f"predicted: device {whole.device_seconds:.3f} s, host {whole.host_seconds:.3f} s for "
        f"{whole.launches:,.0f} launches"
    )


def _host_bound(plan: Plan) -> list[str]:
    """What a GPU that waits for the host is told; nothing for another."""
    if not plan.time.is_host_bound:
        return []
    whole = plan.time.whole
    ways = "fewer GPUs or a larger train.global_batch_size give each GPU more"
    if plan.micro_batch_size < plan.workload.local_batch_size:
        ways = "take larger micro-batches"
    if not plan.compiled and plan.ds_config.stage < 3:
        ways += ", and model.compile=true saves launches"
    return [
        f"Host-bound: with {plan.micro_batch_size} images at a time the GPU would be done in "
        f"{whole.device_seconds:.3f} s, and the host (+-40 %) in {whole.host_seconds:.3f} s; {ways}"
    ]


def _kept_scores(plan: Plan) -> list[str]:
    """What the scores that later epochs read take on disk; nothing where none are kept."""
    if not plan.kept_scores_bytes:
        return []
    space = plan.kept_scores_bytes / 1e9
    return [f"Scores: up to {space:,.2f} GB in the run folder, those of two epochs (teacher.reuse)"]


def _mark(plan: Plan, title: str) -> str:
    return f"{title} <-" if title == plan.own.title else title
