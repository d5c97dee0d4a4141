"""Compiles every Triton kernel for GPUs that need not be here and prints what each one uses.

Run as a script, as test_ahead_of_time.py does: the interpreter needs another process.
The table has one line per kernel, shape and architecture: registers per thread, shared memory and
local memory (stack and spills) in bytes. Ends with status 1 if a kernel uses local memory.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aclip.kernels.attentive_pack import kernel as pack
from aclip.kernels.attentive_pack import kernel_backward as pack_backward
from aclip.kernels.augment_views import kernel as augment
from aclip.kernels.cls_attention_scores import kernel as scores
from aclip.kernels.cluster_counts import kernel as clusters
from aclip.kernels.contrastive_loss import kernel as contrastive
from aclip.kernels.cut_views import kernel as cut
from aclip.kernels.sigmoid_loss import kernel as sigmoid

ARCHITECTURES = (80, 90, 100)
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
TOWERS = {"ViT-B/16": (14, 768, 12), "ViT-L/16": (14, 1024, 16), "ViT-L/14": (16, 1024, 16)}
"""Patches per side, width, heads."""
HEAD_DIM, BLOCK_SIZE, VIEWS, ROWS, PLANE = 64, 2, 2, 512, 224 * 224


@dataclass
class Case:
    """One specialisation of a kernel, with arguments as its launcher passes them."""

    name: str
    kernel: triton.JITFunction
    pointers: dict[str, str]
    values: dict[str, int | float]
    constants: dict[str, int | bool]
    num_warps: int


def cases():
    """Every kernel at the shapes of the three towers, bf16."""
    for tower, (grid, width, heads) in TOWERS.items():
        kept_blocks = -(-((grid // BLOCK_SIZE) ** 2) // 2)
        for with_boxes in (True, False):
            yield Case(
                f"attentive_pack {tower}{'' if with_boxes else ' random'}",
                pack.attentive_pack_kernel,
                dict.fromkeys(("patches_ptr", "cls_ptr", "pos_ptr", "packed_ptr"), "bf16")
                | {"scores_ptr": "fp32", "keep_ids_ptr": "i64", "inverse_ptr": "i32"}
                | {"teacher_box_ptr": "i32", "view_boxes_ptr": "i32"},
                {"stride_tm": grid * grid * width, "stride_tp": width, "V": VIEWS, "G": grid}
                | {"S": grid, "C": width, "num_kept_blocks": kept_blocks},
                {"HAS_BOXES": with_boxes, **pack.forward_blocks(grid, grid, width, BLOCK_SIZE)},
                pack.NUM_WARPS,
            )
        for with_patches in (True, False):
            yield Case(
                f"attentive_pack backward {tower}{' with patches' if with_patches else ''}",
                pack_backward.attentive_pack_backward_kernel,
                dict.fromkeys(("grad_ptr", "d_patches_ptr", "d_cls_ptr", "d_pos_ptr"), "bf16")
                | {"inverse_ptr": "i32"},
                {"M": ROWS, "P": grid * grid, "K": kept_blocks * BLOCK_SIZE**2, "C": width},
                {"GRAD_PATCHES": with_patches, "GRAD_CLS": True, "GRAD_POS": True}
                | pack_backward.backward_blocks(width),
                pack_backward.NUM_WARPS,
            )
        tokens, row = 1 + grid * grid, 3 * heads * HEAD_DIM
        yield Case(
            f"cls_attention_scores {tower}",
            scores.cls_attention_kernel,
            {"q_ptr": "bf16", "k_ptr": "bf16", "scores_ptr": "fp32"},
            {"stride_qb": tokens * row, "stride_qh": HEAD_DIM, "stride_kb": tokens * row}
            | {"stride_kn": row, "stride_kh": HEAD_DIM, "N": tokens, "H": heads, "D": HEAD_DIM}
            | {"scale": 0.125, "weight": 0.01},
            scores.block_sizes(tokens, HEAD_DIM),
            scores.NUM_WARPS,
        )
        side = 224
        yield Case(
            f"cluster_counts {tower}",
            clusters.cluster_counts_kernel,
            {"views_ptr": "bf16", "anchors_ptr": "i64", "counts_ptr": "i32"},
            {"A": 6, "G": grid, "R": side, "threshold": 0.65},
            clusters.block_sizes(grid, side // grid),
            clusters.NUM_WARPS,
        )
    yield from augment_cases()
    for has_flips in (False, True):
        yield Case(
            f"cut_views{' with flips' if has_flips else ''}",
            cut.cut_views_kernel,
            {"pixels_ptr": "u8", "places_ptr": "i64", "boxes_ptr": "i32"}
            | {"flips_ptr": "i1" if has_flips else "u8", "out_ptr": "u8"},
            {"V": VIEWS, "SIDE": 224},
            {"HAS_FLIPS": has_flips, "BLOCK_Y": cut.BLOCK_Y, "BLOCK_X": cut.BLOCK_X},
            cut.NUM_WARPS,
        )
    num_columns = 32768
    yield Case(
        "contrastive_loss softmax",
        contrastive.softmax_gradient_kernel,
        dict.fromkeys(("dots_ptr", "loss_ptr", "scale_ptr"), "fp32"),
        {"N": num_columns, "first_label": 4096, "inverse_num_rows": 1e-4},
        {"BLOCK_N": contrastive.block_size(num_columns)},
        contrastive.NUM_WARPS,
    )
    yield Case(
        "sigmoid_loss",
        sigmoid.sigmoid_gradient_kernel,
        dict.fromkeys(("dots_ptr", "loss_ptr", "sum_ptr", "scale_ptr", "bias_ptr"), "fp32"),
        {"N": num_columns, "first_label": 4096, "inverse_num_rows": 1e-4},
        {"BLOCK_N": sigmoid.block_size(num_columns)},
        sigmoid.NUM_WARPS,
    )


def augment_cases():
    floats = ("params_ptr", "partial_ptr", "mean_ptr", "std_ptr", "buffer_ptr", "source_ptr")
    pointers = dict.fromkeys(floats, "fp32") | {"views_ptr": "u8", "out_ptr": "bf16"}
    block = {"BLOCK": augment.BLOCK}
    tiles = triton.next_power_of_2(triton.cdiv(PLANE, augment.BLOCK))
    plane, size = {"PLANE": PLANE}, {"H": 224, "W": 224}
    warps = augment.NUM_WARPS
    yield Case("augment_views mean", augment.gray_mean_kernel, pointers, plane, block, warps)
    for has_params, name in ((True, "augment_views pointwise"), (False, "augment_views normalise")):
        constants = block | {"HAS_PARAMS": has_params, "TILES": tiles}
        yield Case(name, augment.pointwise_kernel, pointers, plane, constants, warps)
    for along_rows, axis in ((True, "rows"), (False, "columns")):
        constants = block | {"ALONG_ROWS": along_rows}
        target = pointers | {"out_ptr": "fp32" if along_rows else "bf16"}
        name = f"augment_views blur {axis}"
        yield Case(name, augment.blur_kernel, target, size, constants, warps)


def compile_case(case: Case, architecture: int) -> tuple[int, int, int]:
    """(registers per thread, bytes of shared memory, bytes of local memory)."""
    signature, attributes, constants = {}, {}, dict(case.constants)
    for position, name in enumerate(case.kernel.arg_names):
        # As a launch specialises: integers equal to 1, integers and pointers divisible by 16.
        value = case.values.get(name)
        if name in case.constants:
            signature[name] = "constexpr"
        elif name in case.pointers:
            signature[name] = f"*{case.pointers[name]}"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
        if signature[name][0] == "*" or (signature[name] == "i32" and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": case.num_warps},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK", "LOCAL")
    )
    return registers, compiled.metadata.shared, stack + local


def main() -> int:
    print(f"{'kernel':44}{'arch':>8}{'registers':>11}{'shared B':>10}{'local B':>9}")
    spilled = False
    for case in cases():
        for architecture in ARCHITECTURES:
            registers, shared, local = compile_case(case, architecture)
            spilled |= local > 0
            print(
                f"{case.name:44}{f'sm_{architecture}':>8}{registers:>11}{shared:>10}{local:>9}",
                flush=True,
            )
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main())
