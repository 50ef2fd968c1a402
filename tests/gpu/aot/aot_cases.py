"""Every kernel with every configuration that it ships: what a launch would compile."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from aot_compile import FLOATS, SHARED_LIMIT
from triton.experimental.gluon import language as gl

from cropi_kernels._launch import MEMBERS
from cropi_kernels.ops import _triton_segments as segments
from cropi_kernels.ops.linear_logprob import triton as logprob
from cropi_kernels.ops.linear_logprob import triton_tile_kernels as tile_kernels
from cropi_kernels.ops.linear_logprob import triton_tiles as tiles
from cropi_kernels.ops.linear_logprob import triton_turns as turns
from cropi_kernels.ops.norm_grad import triton as norm
from cropi_kernels.ops.project import triton as project_kernels
from cropi_kernels.ops.project import triton_draws as draws
from cropi_kernels.ops.project import triton_runs as runs
from cropi_kernels.ops.rms_norm import triton as rms
from cropi_kernels.ops.sketch_embedding import triton as rows
from cropi_kernels.ops.sketch_grouped import triton as stack
from cropi_kernels.ops.sketch_linear import triton as linear
from cropi_kernels.ops.sketch_vector import triton as vector
from cropi_kernels.ops.swiglu import triton as gates


@dataclasses.dataclass(frozen=True)
class Case:
    """``registers``: the most that the kernel may use (65536 are shared by the threads of a multiprocessor)."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, int]
    registers: int
    tensor_cores: bool = False


def _types(kernel: Any, pointers: dict[str, str], floats: tuple[str, ...] = ()) -> dict[str, str]:
    return {n: pointers.get(n) or ("fp32" if n in floats else "i32") for n in kernel.arg_names}


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)  # type: ignore[no-any-return]


def slab(
    dtype: str, slab_cols: int, capability: int, into: str = "sums", signs: bool = False, alone: bool = False
) -> Case:
    constants = linear.slab_options(slab_cols, _dtype(dtype), SHARED_LIMIT[capability])
    options = {
        name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants
    }
    constants |= dict(SLAB_ROWS=32768 // slab_cols, SLAB_COLS=slab_cols, COLUMN_SIGNS=signs, ALONE=alone)
    constants |= dict(PAIRS=linear.lanes(slab_cols), INTO=into)
    word = f"*{FLOATS[dtype]}"
    pointers = dict.fromkeys(("d_0", "d_1", "d_2", "a", "row_sign"), word)
    pointers |= dict(out="*fp32", partial="*fp32", table="*i64", pairs="*i64", first="*i32", flips="*i32")
    # A wide tile has a multiprocessor to itself.
    usual = (
        {256: 254 if signs else 244, 128: 202 if signs else 196}.get(constants["BN"], 128)
        if dtype != "float32"
        else 160
    )
    sizes = [f"{name}_{i}" for name in ("rows", "stride") for i in range(MEMBERS)]
    name = " ".join(["slab", dtype, str(slab_cols), into, *["signs"] * signs, *["alone"] * alone])
    return Case(
        name, linear.slab_kernel, _types(linear.slab_kernel, pointers), constants,
        (*sizes, "cols", "stride_a", "padded_rows"), options, options.get("maxnreg", usual),
        tensor_cores=dtype != "float32",
    )  # fmt: skip


def grouped(dtype: str, slab_cols: int, capability: int, entries: int, aligned: bool = True) -> Case:
    config = linear.slab_config(slab_cols, _dtype(dtype), SHARED_LIMIT[capability])
    shape = dataclasses.asdict(config)
    options = {"num_warps": shape.pop("num_warps"), "num_stages": shape.pop("num_stages")}
    options |= stack.register_limit(aligned, config.BN, entries)
    word = f"*{FLOATS[dtype]}"
    pointers = dict(d=word, a=word, partial="*fp32", offsets="*i64", words="*i64", group="*i32", first="*i32")
    constants = dict(
        shape, SLAB_ROWS=32768 // slab_cols, SLAB_COLS=slab_cols, ENTRIES=entries, ALIGNED=aligned
    )
    integers = ("rows", "cols", "first_row", "row_step", "padded_rows", "stride_d", "stride_a")
    return Case(
        f"grouped {dtype} {slab_cols} {entries}{'' if aligned else ' anywhere'}", stack.grouped_kernel,
        _types(stack.grouped_kernel, pointers | {"row_sign": word}), constants,
        integers if aligned else ("cols", "padded_rows", "stride_d", "stride_a"), options,
        {256: 250, 128: 200}.get(config.BN, 168 if aligned and entries <= 32 else 200), tensor_cores=dtype != "float32",
    )  # fmt: skip


def fold(dtype: str, width: int) -> Case:
    word = f"*{FLOATS[dtype]}"
    pointers = dict(x=word, out=word, sign="*i8", offset="*i32")
    constants = dict(BT=linear.FOLD_TOKENS, BW=width)
    return Case(
        f"fold {dtype} {width}", linear.fold_kernel, _types(linear.fold_kernel, pointers), constants,
        ("cols", "width", "stride_x"), {"num_warps": linear.FOLD_WARPS}, 128,
    )  # fmt: skip


def embedding(dtype: str, folded: bool) -> Case:
    pointers = dict(
        x=f"*{FLOATS[dtype]}", ids="*i64", out="*fp32", partial="*fp32", table="*i64", by_pair="*i64"
    )
    pointers |= dict(row_sign="*i8", row_fold="*i32", col_sign="*i8")
    exact = dtype == "float32"
    constants = rows.tile(256, exact) | dict(SLAB_ROWS=128, SLAB_COLS=256, FOLDED=folded)
    options = {"num_warps": constants.pop("num_warps"), "num_stages": 2}
    return Case(
        f"embedding {dtype}{' folded' if folded else ''}", rows.rows_kernel, _types(rows.rows_kernel, pointers),
        constants, ("cols", "stride_x"), options, 200, tensor_cores=not exact,
    )  # fmt: skip


def norm_grad(dtype: str, n: int, centered: bool) -> Case:
    word = f"*{FLOATS[dtype]}"
    pointers = {"x": word, "dy": word, "table": "*i64"} | dict.fromkeys(
        ("weight", "bias", "partial"), "*fp32"
    )
    constants = dict(CENTERED=centered, WITH_BIAS=centered, **norm.row_constants(n))
    options = {"num_warps": constants.pop("num_warps")}
    return Case(
        f"norm {dtype} {n}", norm.norm_kernel, _types(norm.norm_kernel, pointers, ("eps",)), constants,
        ("n", "stride_x", "stride_dy", "weight_at", "bias_at"), options, 128,
    )  # fmt: skip


def rms_norm(dtype: str, n: int) -> Case:
    word = f"*{FLOATS[dtype]}"
    tokens, features, warps = rms.forward_tile(n)
    types = _types(rms.rms_kernel, dict(x=word, weight=word, y=word, scale="*fp32"), ("eps",))
    return Case(
        f"rms {dtype} {n}", rms.rms_kernel, types, dict(BT=tokens, BN=features), ("n", "stride_x"),
        {"num_warps": warps}, 168 if n > 4096 else 128,
    )  # fmt: skip


def rms_norm_backward(dtype: str, n: int, with_sums: bool) -> Case:
    pointers = dict.fromkeys(("dy", "x", "weight", "dx"), f"*{FLOATS[dtype]}") | {"table": "*i64"}
    pointers |= dict.fromkeys(("scale", "out", "partial"), "*fp32")
    constants = dict(SUMS=with_sums, CHUNK=norm.CHUNK_TOKENS, **norm.row_constants(n))
    options = {"num_warps": constants.pop("num_warps")}
    return Case(
        f"rms-backward {dtype} {n}{'' if with_sums else ' alone'}", rms.rms_backward_kernel,
        _types(rms.rms_backward_kernel, pointers), constants, ("n", "stride_dy", "stride_x", "sums_at"),
        options, 128,
    )  # fmt: skip


def swiglu(dtype: str) -> Case:
    kernel = gates.swiglu_kernel
    types = _types(kernel, dict.fromkeys(("gate", "up", "h"), f"*{FLOATS[dtype]}"))
    aligned, constants = ("cols", "stride_gate", "stride_up"), dict(BC=gates.COLUMNS)
    return Case(f"swiglu {dtype}", kernel, types, constants, aligned, {"num_warps": 4}, 96)


def swiglu_fold(dtype: str, width: int) -> Case:
    kernel = gates.swiglu_fold_kernel
    pointers = dict.fromkeys(("gate", "up", "h", "folded"), f"*{FLOATS[dtype]}")
    types = _types(kernel, pointers | {"sign": "*i8", "offset": "*i32"})
    aligned = "cols", "width", "stride_gate", "stride_up"
    constants = dict(NB=max(1, gates.COLUMNS // width), BW=width)
    return Case(f"swiglu-fold {dtype} {width}", kernel, types, constants, aligned, {"num_warps": 4}, 96)


def swiglu_backward(dtype: str) -> Case:
    kernel = gates.swiglu_backward_kernel
    types = _types(kernel, dict.fromkeys(("dh", "gate", "up", "dgate", "dup"), f"*{FLOATS[dtype]}"))
    aligned = ("cols", "stride_dh", "stride_gate", "stride_up")
    constants = dict(BC=gates.COLUMNS)
    return Case(f"swiglu-backward {dtype}", kernel, types, constants, aligned, {"num_warps": 4}, 96)


def sums(dtype: str) -> Case:
    pointers = dict.fromkeys(("dy_0", "dy_1", "dy_2"), f"*{FLOATS[dtype]}") | {
        "out": "*fp32", "partial": "*fp32", "table": "*i64",
    }  # fmt: skip
    sizes = tuple(f"{name}_{i}" for name in ("n", "stride", "at") for i in range(MEMBERS))
    constants = dict(BT=norm.BIAS_TOKENS, BN=norm.BIAS_FEATURES)
    types = _types(norm.sums_kernel, pointers)
    return Case(
        f"sums {dtype}", norm.sums_kernel, types, constants, sizes, {"num_warps": norm.BIAS_WARPS}, 96
    )


def log_prob(dtype: str, capped: bool, backward: bool) -> Case:
    kernel = logprob.backward_kernel if backward else logprob.forward_kernel
    pointers = dict(z="*fp32", dz=f"*{FLOATS[dtype]}", target="*i64")
    pointers |= dict.fromkeys(("grad", "logp", "top", "log_sum", "entropy"), "*fp32")
    block = logprob.BACKWARD_BLOCK if backward else logprob.FORWARD_BLOCK
    constants = dict(CAPPED=capped, BLOCK=block) | ({} if backward else {"ENTROPY": capped})
    return Case(
        f"log-prob {'backward' if backward else 'forward'} {dtype}{' capped' if capped else ''}", kernel,
        _types(kernel, pointers, ("scale", "softcap")), constants, ("stride", "stride_z", "stride_dz", "vocabulary"),
        {"num_warps": 8}, 128,
    )  # fmt: skip


def slab_turns(
    dtype: str,
    cols: int,
    into: str,
    signs: bool = False,
    alone: bool = False,
    groups: int = 3,
    held: bool = False,
    stays: bool = False,
) -> Case:
    """12 warps share the registers, as of `log_prob_turns`; of narrow slabs, those of half a multiprocessor."""
    turns = linear.turns_options(cols, groups, held, stays)
    launch = linear.turns_launch(32768 // cols, cols, signs, alone, tuple(turns.items()), into)
    kernel = launch.kernel
    constants = {k: v for k, v in launch.constants.items() if k in kernel.arg_names}
    like = slab(dtype, cols, 90)
    types = {n: like.types[n] for n in kernel.arg_names if n not in constants}
    name = f"slab turns {dtype} {cols} {into}{' signs' if signs else ''}{' parts' if groups < 3 else ''}"
    name += " held" * held + " stay" * stays
    options = {k: v for k, v in launch.constants.items() if k not in constants}
    return Case(name, kernel, types, constants, like.aligned, options, turns.get("maxnreg", 168), True)


def log_prob_tiles(dtype: str, keep: bool, entropy: bool = False, again: bool = False) -> Case:
    """With entropies, a bias too."""
    kernel = tile_kernels.again_kernel if again else tile_kernels.tiles_kernel
    shape = dict(TOKENS=tiles.TOKENS, WORDS=tiles.WORDS, FEATURES=tiles.FEATURES)
    word = FLOATS[dtype]
    pointers = dict.fromkeys(("bias", "own", "anchors", "rests", "weighted"), "*fp32")
    pointers |= {"target": "*i64", "e": f"*{word}", "far": "*i32"}
    pointers |= {n: f"tensordesc<{word}[{shape[rows]}, {tiles.FEATURES}]>" for n, rows in
                 (("hidden", "TOKENS"), ("head", "WORDS"))}  # fmt: skip
    by_row = dtype == "bfloat16"
    constants = shape | dict(BIAS=entropy, ENTROPY=entropy, KEEP=keep, LIFT=1.0 if by_row else tiles.LIFT)
    constants |= dict(FLAGS=tiles.FLAGS) if again else dict(BY_ROW=by_row)
    return Case(
        f"tiles {dtype}{' entropy' if entropy else ''}{' kept' if keep else ''}{' again' if again else ''}", kernel,
        _types(kernel, pointers, ("scale",)), constants, ("vocabulary", "features", "stride"),
        {"num_warps": tiles.WARPS, "num_stages": tiles.STAGES}, 255, True,
    )  # fmt: skip


def log_prob_turns(dtype: str, keep: bool, entropy: bool = False) -> Case:
    """12 warps share the registers; ptxas counts them before the groups take some of the warp that brings operands."""
    like = log_prob_tiles(dtype, keep, entropy)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    rows, columns = tiles.TOKENS // turns.GROUPS.value, {"e": tiles.WORDS // turns.PIECES.value}
    types = like.types | {
        name: f"tensordesc<{FLOATS[dtype]}[{n}, {columns.get(name, tiles.FEATURES)}],{layout!r}>"
        for name, n in (("hidden", rows), ("head", tiles.WORDS), *([("e", rows)] if keep else []))
    }
    name = like.name.replace("tiles", "turns")
    constants = like.constants | dict(STAGES=tiles.STAGES)
    return Case(
        name, turns.turns_kernel, types, constants, like.aligned, {"num_warps": turns.WARPS.value}, 168, True
    )


def log_prob_own() -> Case:
    pointers = dict.fromkeys(("hidden", "head"), "*bf16") | dict.fromkeys(("bias", "own"), "*fp32")
    constants = dict(BIAS=True, ROWS=tiles.OWN_ROWS, FEATURES=tiles.OWN_FEATURES)
    types = _types(tile_kernels.own_kernel, pointers | {"target": "*i64"})
    aligned = "features", "stride_hidden", "stride_head"
    return Case("targets' logits", tile_kernels.own_kernel, types, constants, aligned, {"num_warps": 4}, 128)


def log_prob_of_tiles(backward: bool, whole: bool = False) -> Case:
    kernel = tile_kernels.rescale_kernel if backward else tile_kernels.combine_kernel
    pointers = dict.fromkeys(
        (
            "own",
            "anchors",
            "rests",
            "weighted",
            "grad",
            "logp",
            "top",
            "log_sum",
            "entropy",
            "factor",
            "missing",
        ),
        "*fp32",
    )
    pointers |= {"target": "*i64", "e": "*bf16"}
    constants = (
        dict(TILES=tiles.RESCALED_TILES, WORDS=tiles.WORDS, WHOLE=whole, LIFT=1.0)
        if backward
        else dict(ENTROPY=True, TILES=tiles.COMBINED_TILES, ROWS=tiles.COMBINED_ROWS)
    )
    return Case(
        f"log-prob of tiles{' backward' if backward else ''}{' whole' if whole else ''}", kernel,
        _types(kernel, pointers, ("scale",)), constants, ("vocabulary", "stride"),
        {"num_warps": 8 if backward else 4}, 128,
    )  # fmt: skip


def log_prob_scale() -> Case:
    pointers = dict.fromkeys(("product", "factor", "missing"), "*fp32") | dict.fromkeys(
        ("head", "out"), "*bf16"
    )
    types = _types(tile_kernels.scale_kernel, pointers | {"target": "*i64"})
    aligned = "features", "stride_head", "stride_out"
    return Case(
        "rows times factors",
        tile_kernels.scale_kernel,
        types,
        dict(FEATURES=tiles.SCALED),
        aligned,
        {"num_warps": 4},
        64,
    )


def on_hopper() -> list[Case]:
    """Kernels that launch on this generation alone."""
    return [
        slab_turns("bfloat16", 256, "slots", signs=True, alone=True),
        slab_turns("bfloat16", 256, "slots"),
        slab_turns("bfloat16", 256, "sums"),
        slab_turns("bfloat16", 256, "slots", signs=True, alone=True, held=True),
        slab_turns("bfloat16", 256, "slots", signs=True, held=True),
        slab_turns("bfloat16", 256, "slots", signs=True, alone=True, stays=True),
        slab_turns("bfloat16", 128, "sums"),
        slab_turns("bfloat16", 128, "out", signs=True),
        slab_turns("bfloat16", 128, "sums", groups=1),
        slab_turns("bfloat16", 64, "sums"),
        slab_turns("bfloat16", 64, "out", signs=True),
        log_prob_tiles("bfloat16", keep=False),
        log_prob_tiles("bfloat16", keep=True),
        log_prob_tiles("bfloat16", keep=False, entropy=True),
        log_prob_tiles("bfloat16", keep=True, entropy=True, again=True),
        log_prob_tiles("float16", keep=True),
        log_prob_turns("bfloat16", keep=False),
        log_prob_turns("bfloat16", keep=True),
        log_prob_turns("bfloat16", keep=False, entropy=True),
        log_prob_own(),
        log_prob_scale(),
        log_prob_of_tiles(backward=False),
        log_prob_of_tiles(backward=True),
        log_prob_of_tiles(backward=True, whole=True),
    ]


def chunks() -> Case:
    kernel = segments.chunks_kernel
    constants = dict(CHUNK=512, ALWAYS=False, BLOCK=segments.SEGMENT_BLOCK)
    types = _types(kernel, dict(offsets="*i64", table="*i64"))
    return Case("chunks", kernel, types, constants, (), {"num_warps": 1}, 96)


def reduce_partials() -> Case:
    kernel = segments.reduce_partials_kernel
    types = _types(kernel, dict(partial="*fp32", out="*fp32", table="*i64"))
    constants = dict(BLOCK=segments.REDUCE_BLOCK, AHEAD=segments.REDUCE_AHEAD)
    return Case("reduce", kernel, types, constants, ("width", "out_stride"), {"num_warps": 4}, 64)


def sketch_vector() -> Case:
    pointers = dict(gradient="*fp32", out="*fp32", position="*i64", source="*i32", sign="*i8")
    types = _types(vector.vector_kernel, pointers)
    return Case("vector", vector.vector_kernel, types, dict(BLOCK=vector.BLOCK), (), {"num_warps": 4}, 64)


def sketch_tail() -> Case:
    pointers = dict(partial="*fp32", out="*fp32", left="*fp32", table="*i64", entries="*i32", sign="*i8")
    types = _types(vector.tail_kernel, pointers)
    constants = dict(SLAB=32768, BLOCK=vector.TAIL_BLOCK)
    return Case("tail", vector.tail_kernel, types, constants, ("stride_out",), {"num_warps": 4}, 96)


_PROJECT = {
    "x": "*fp32",
    "y": "*fp32",
    "partial": "*fp32",
    "signs": "*i32",
    "keeps": "*i32",
    "places": "*i32",
}
_PROJECT |= dict.fromkeys(("first_draw", "first_tile", "column", "n", "stride_x"), "i64")


def project(
    kernel: Any,
    name: str,
    constants: dict[str, Any],
    dtype: str = "float32",
    registers: int = 128,
    warps: int = 4,
) -> Case:
    types = _types(kernel, _PROJECT | {"x": f"*{FLOATS[dtype]}"}, ("scale",))
    aligned = tuple(n for n in ("dim", "width", "stride_x", "stride_y") if n in types)
    return Case(f"project {name} {dtype}", kernel, types, constants, aligned, {"num_warps": warps}, registers)


def projects() -> list[Case]:
    one, four = (dict(GROUP=8, BLOCK=project_kernels.gather_block(nnz), SINGLE=nnz == 1) for nnz in (1, 4))
    spread = dict(GROUP=8, BLOCK=project_kernels.SPREAD_BLOCK)
    drawn = dict(SIGN=13, KEEP=15, TILE=14, GROUP=16, BLOCK=draws.BLOCK)
    add = dict(PARTS=project_kernels.ADD_PARTS, COLUMNS=project_kernels.ADD_COLUMNS)
    by_runs = dict(KEEP=False, ALIGNED=True, EVEN=True, RUNS=project_kernels.RUNS)
    warps = project_kernels.GATHER_WARPS
    return [
        # Five programs on a multiprocessor.
        *(project(runs.gather_runs_kernel, "gather by runs", by_runs, t, 48, warps) for t in FLOATS),
        project(
            runs.gather_runs_kernel, "gather by runs, kept", by_runs | {"KEEP": True}, "bfloat16", 48, warps
        ),
        project(
            runs.gather_runs_kernel,
            "gather by runs anywhere",
            by_runs | {"KEEP": True, "ALIGNED": False, "EVEN": False},
            "bfloat16",
            128,
            warps,
        ),
        *(
            project(
                runs.spread_runs_kernel,
                f"spread by runs, {'one' if single else 'all'}",
                dict(KEEP=True, ALIGNED=True, SINGLE=single, RUNS=project_kernels.SPREAD_RUNS),
                registers=80,
            )
            for single in (True, False)
        ),
        *(project(project_kernels.gather_kernel, "gather", one | {"KEEP": False}, t, 128) for t in FLOATS),
        project(project_kernels.gather_kernel, "gather kept", one | {"KEEP": True}, "bfloat16", 168),
        project(project_kernels.gather_kernel, "gather sjlt", four | {"KEEP": False}, "bfloat16", 168),
        project(project_kernels.gather_kernel, "gather sjlt kept", four | {"KEEP": True}, "float32", 168),
        project(project_kernels.spread_kernel, "spread", spread | {"KEEP": True}),
        project(draws.draws_kernel, "draws", drawn | {"DROPS": False}, registers=64),
        project(draws.draws_kernel, "draws and mask", drawn | {"DROPS": True}, registers=64),
        project(project_kernels.add_kernel, "add", add),
    ]


def all_cases(capability: int) -> list[Case]:
    return [
        *(on_hopper() if capability == 90 else []),
        slab("bfloat16", 256, capability, "slots"),
        slab("bfloat16", 256, capability, "slots", signs=True, alone=True),
        slab("bfloat16", 64, capability, "out"),
        *(slab("bfloat16", cols, capability) for cols in (128, 64, 16)),
        slab("float16", 64, capability),
        slab("float32", 64, capability),
        grouped("bfloat16", 64, capability, 32),
        grouped("bfloat16", 256, capability, 32),
        grouped("bfloat16", 64, capability, stack.MOST_ENTRIES),
        grouped("bfloat16", 64, capability, 32, aligned=False),
        grouped("float32", 64, capability, 32),
        fold("bfloat16", 64),
        fold("float32", 128),
        embedding("bfloat16", folded=False),
        embedding("bfloat16", folded=True),
        embedding("float32", folded=False),
        norm_grad("bfloat16", 1536, centered=False),
        norm_grad("bfloat16", 3584, centered=False),
        norm_grad("bfloat16", 128, centered=True),
        norm_grad("float32", 8192, centered=True),
        rms_norm("bfloat16", 1536),
        rms_norm("float32", 8192),
        rms_norm_backward("bfloat16", 1536, with_sums=True),
        rms_norm_backward("bfloat16", 3584, with_sums=True),
        rms_norm_backward("bfloat16", 128, with_sums=False),
        rms_norm_backward("float32", 8192, with_sums=True),
        swiglu("bfloat16"),
        swiglu("float32"),
        swiglu_fold("bfloat16", 64),
        swiglu_fold("bfloat16", 256),
        swiglu_fold("float32", 128),
        swiglu_backward("bfloat16"),
        swiglu_backward("float32"),
        sums("bfloat16"),
        log_prob("bfloat16", capped=False, backward=False),
        log_prob("float32", capped=True, backward=False),
        log_prob("bfloat16", capped=False, backward=True),
        log_prob("float32", capped=True, backward=True),
        chunks(),
        reduce_partials(),
        sketch_vector(),
        sketch_tail(),
        *projects(),
    ]
