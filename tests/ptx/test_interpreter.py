"""Does the interpreter do what PTX says, and does it notice what a device would not do? PTX written by hand, so that
nothing but numpy is needed."""

import ctypes

import numpy as np
import pytest

from ptx import values
from ptx.launch import Counts, Launch
from ptx.module import read_module
from ptx.values import Fault

pytestmark = pytest.mark.once

HEAD = """
.version 9.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry kernel(.param .u64 in, .param .u64 out)
{
    .reg .pred %p<8>;
    .reg .b16 %rs<8>;
    .reg .f32 %f<32>;
    .reg .f64 %fd<8>;
    .reg .b32 %r<32>;
    .reg .b64 %rd<16>;
    .shared .align 16 .b8 words[4096];
    ld.param.u64 %rd1, [in];
    ld.param.u64 %rd2, [out];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;  // this thread's word of the input
    add.s64 %rd5, %rd2, %rd3;  // and of the output
    shl.b32 %r3, %r1, 2;
    mov.u32 %r4, words;
    add.s32 %r5, %r4, %r3;  // and of shared memory
"""


def run(body: str, given: np.ndarray, threads: int = 64, dynamic_bytes: int = 0, **options) -> np.ndarray:
    """The output, a word of 32 bits for each thread, of a kernel with this body."""
    kernel = read_module(HEAD + body + "\n    ret;\n}\n")["kernel"]
    out = np.full(threads, 0xDEADBEEF, np.uint32)
    parameters = np.array([given.ctypes.data, out.ctypes.data], np.uint64).tobytes()
    Launch(kernel, (1, 1), threads, dynamic_bytes, parameters, **options).run()
    return out


def words(kind: str, threads: int = 64) -> np.ndarray:
    """A number of every kind for each thread."""
    rng = np.random.default_rng(0)
    if kind == "f32":
        return np.concatenate([rng.standard_normal(threads - 4), [0, -0.0, np.inf, np.nan]]).astype(np.float32)
    edges = np.array([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], np.uint32)
    return np.concatenate([edges, rng.integers(0, 1 << 32, threads - 5, dtype=np.uint32)])


@pytest.mark.parametrize(
    "instruction, kind, wanted",
    [
        ("add.f32 %f2, %f1, 0f40400000;", "f32", lambda x: x + np.float32(3)),
        ("fma.rn.f32 %f2, %f1, %f1, 0f3F800000;", "f32", lambda x: (x.astype(np.float64) ** 2 + 1).astype(np.float32)),
        ("max.f32 %f2, %f1, 0f00000000;", "f32", lambda x: np.fmax(x, np.float32(0))),
        ("setp.ltu.f32 %p1, %f1, 0f00000000; selp.f32 %f2, %f1, 0f3F800000, %p1;", "f32",
         lambda x: np.where((x < 0) | np.isnan(x), x, np.float32(1))),
        ("setp.lt.f32 %p1, %f1, 0f00000000; selp.f32 %f2, %f1, 0f3F800000, %p1;", "f32",
         lambda x: np.where(x < 0, x, np.float32(1))),
        ("cvt.rn.f16.f32 %rs1, %f1; cvt.f32.f16 %f2, %rs1;", "f32", lambda x: x.astype(np.float16).astype(np.float32)),
        ("cvt.rzi.s32.f32 %r7, %f1; cvt.rn.f32.s32 %f2, %r7;", "f32",
         lambda x: np.where(np.isnan(x), 0, np.clip(np.trunc(x), -(2.0**31), 2.0**31 - 1)).astype(np.float32)),
        ("cvt.f64.f32 %fd1, %f1; mul.f64 %fd2, %fd1, %fd1; cvt.rm.f32.f64 %f2, %fd2;", "f32",
         lambda x: values.to_f32(x.astype(np.float64) ** 2, "rm")),
        ("mul.hi.u32 %r7, %r6, %r6;", "u32", lambda x: ((x.astype(np.uint64) ** 2) >> np.uint64(32)).astype(np.uint32)),
        ("div.s32 %r7, %r6, -7;", "u32",
         lambda x: np.trunc(x.view(np.int32) / -7).astype(np.int64).astype(np.uint32)),
        ("rem.u32 %r7, %r6, 1000;", "u32", lambda x: x % np.uint32(1000)),
        ("shr.s32 %r7, %r6, 40;", "u32", lambda x: (x.view(np.int32) >> 31).view(np.uint32)),
        ("brev.b32 %r7, %r6;", "u32", lambda x: np.array([int(f"{v:032b}"[::-1], 2) for v in x], np.uint32)),
        ("bfind.shiftamt.u32 %r7, %r6;", "u32",
         lambda x: np.array([32 - int(v).bit_length() if v else 0xFFFFFFFF for v in x], np.uint32)),
        ("prmt.b32 %r7, %r6, 0, 0x1234;", "u32",
         lambda x: ((x >> 8 & 0xFF) << 24) | ((x >> 16 & 0xFF) << 16) | (x >> 24 << 8)),
        ("lop3.b32 %r7, %r6, 255, 65535, 0x96;", "u32", lambda x: x ^ np.uint32(255) ^ np.uint32(65535)),
        ("shf.l.wrap.b32 %r7, %r6, %r6, 8;", "u32", lambda x: (x << np.uint32(8)) | (x >> np.uint32(24))),
        ("bfi.b32 %r7, %r6, 0, 8, 4;", "u32", lambda x: (x & np.uint32(15)) << np.uint32(8)),
        ("cvt.s32.s8 %r7, %r6;", "u32", lambda x: x.astype(np.int8).astype(np.int32).view(np.uint32)),
        ("mov.b32 {%rs1, %rs2}, %r6; mov.b32 %r7, {%rs2, %rs1};", "u32",
         lambda x: (x << np.uint32(16)) | (x >> np.uint32(16))),
    ],
)  # fmt: skip
def test_arithmetic(instruction, kind, wanted):
    given = words(kind)
    source, result, word = ("%f1", "%f2", "f32") if kind == "f32" else ("%r6", "%r7", "u32")
    out = run(f"ld.global.{word} {source}, [%rd4]; {instruction} st.global.{word} [%rd5], {result};", given)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(out.view(given.dtype), wanted(given))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_halves_are_rounded_to_the_nearest_even(kind):
    pairs = np.random.default_rng(1).standard_normal((64, 2)).astype(np.float32)
    bits = values.narrow(pairs, kind)
    given = values.pair_of(bits[:, 0], bits[:, 1])
    out = run(f"ld.global.u32 %r6, [%rd4]; fma.rn.{kind}x2 %r7, %r6, %r6, %r6; st.global.u32 [%rd5], %r7;", given)
    x = values.widen(bits, kind).astype(np.float64)
    np.testing.assert_array_equal(np.stack(values.halves_of(out), -1), values.narrow(x * x + x, kind))


def test_threads_part_and_meet_again():
    """A loop that each thread runs as often as its number says, and a sum over the warp afterwards."""
    loop = """
    mov.u32 %r6, 0;
    mov.u32 %r7, 0;
    $again:
    setp.ge.u32 %p1, %r6, %r1;
    @%p1 bra $done;
    add.u32 %r6, %r6, 1;
    add.u32 %r7, %r7, %r6;
    bra.uni $again;
    $done:
    shfl.sync.bfly.b32 %r8|%p2, %r7, 1, 31, -1;
    st.global.u32 [%rd5], %r8;
    """
    thread = np.arange(64)
    wanted = thread * (thread + 1) // 2
    for seed in (None, 1):
        np.testing.assert_array_equal(run(loop, words("u32"), seed=seed), wanted[thread ^ 1])


@pytest.mark.parametrize(
    "mode, by, limits, source",
    [
        ("down", 2, 31, lambda lane: np.where(lane + 2 < 32, lane + 2, lane)),
        ("down", 2, 0x181F, lambda lane: np.where(lane % 8 + 2 < 8, lane + 2, lane)),  # segments of 8 lanes
        ("up", 3, 0, lambda lane: np.where(lane - 3 >= 0, lane - 3, lane)),
        ("idx", 5, 31, lambda lane: 5 + 0 * lane),
        ("bfly", 16, 31, lambda lane: lane ^ 16),
    ],
)
def test_shuffles(mode, by, limits, source):
    given = words("u32", 32)
    body = f"ld.global.u32 %r6, [%rd4]; shfl.sync.{mode}.b32 %r7, %r6, {by}, {limits}, -1; st.global.u32 [%rd5], %r7;"
    np.testing.assert_array_equal(run(body, given, threads=32), given[source(np.arange(32))])


def test_a_vote_counts_the_lanes():
    body = "setp.eq.u32 %p1, %r1, 7; vote.sync.ballot.b32 %r7, %p1, -1; st.global.u32 [%rd5], %r7;"
    np.testing.assert_array_equal(run(body, words("u32")), np.repeat([1 << 7, 0], 32))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_matrices(kind, transposed):
    """A (16, 16) and B (16, 8), of which shared memory holds column after column, or with .trans row after row."""
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 16), (16, 8)))
    in_memory = b if transposed else b.T
    halves = np.concatenate([values.narrow(m, kind).reshape(-1) for m in (a, in_memory)])
    given = np.zeros(256, np.uint32)
    given.view(np.uint16)[: halves.size] = halves
    # Lane l of A's load names row l % 16 and its columns from 8 (l / 16) on; of B's, row l % 8 of matrix l / 8, or with
    # .trans row l.
    row_of_b = (
        "and.b32 %r8, %r1, 15; shl.b32 %r8, %r8, 4;"
        if transposed
        else (
            "and.b32 %r8, %r1, 7; shl.b32 %r8, %r8, 5; and.b32 %r9, %r1, 8; shl.b32 %r9, %r9, 1; add.u32 %r8, %r8, %r9;"
        )
    )
    copies = "".join(f"ld.global.u32 %r6, [%rd4+{128 * k}]; st.shared.u32 [%r5+{128 * k}], %r6;" for k in range(8))
    body = f"""
    {copies}
    bar.warp.sync -1;
    and.b32 %r6, %r1, 15; shl.b32 %r6, %r6, 5; and.b32 %r7, %r1, 16; add.u32 %r6, %r6, %r7; add.u32 %r6, %r6, %r4;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r6];
    {row_of_b} add.u32 %r8, %r8, %r4;
    ldmatrix.sync.aligned.m8n8.x2{".trans" if transposed else ""}.shared.b16 {{%r14, %r15}}, [%r8+512];
    mov.f32 %f1, 0f3F800000;
    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%f2, %f3, %f4, %f5}}, {{%r10, %r11, %r12, %r13}},
        {{%r14, %r15}}, {{%f1, %f1, %f1, %f1}};
    add.s64 %rd6, %rd5, %rd3; add.s64 %rd6, %rd6, %rd3; add.s64 %rd6, %rd6, %rd3;
    st.global.v4.f32 [%rd6], {{%f2, %f3, %f4, %f5}};
    """
    kernel = read_module(HEAD + body + "\n    ret;\n}\n")["kernel"]
    out, counts = np.zeros((32, 4), np.float32), Counts()
    parameters = np.array([given.ctypes.data, out.ctypes.data], np.uint64).tobytes()
    Launch(kernel, (1, 1), 32, 0, parameters, races=True, counts=counts).run()
    lane = np.arange(32)
    got = np.zeros((16, 8), np.float32)
    for r in range(4):
        got[lane // 4 + 8 * (r // 2), 2 * (lane % 4) + r % 2] = out[:, r]
    x, y = (values.widen(values.narrow(m, kind), kind).astype(np.float64) for m in (a, b))
    np.testing.assert_allclose(got, x @ y + 1, rtol=1e-6, atol=1e-6)
    assert counts.total["mma.sync.aligned.m16n8k16.row.col.f32." + f"{kind}.{kind}.f32"] == 1


def test_wavefronts_of_matrices_are_counted():
    """Rows 16 bytes apart lie in different banks; rows 128 bytes apart all in the same."""
    for pitch, wavefronts in ((16, 1), (128, 8)):
        counts = Counts()
        body = f"mul.lo.u32 %r6, %r1, {pitch}; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r7}}, [%r6];"
        run(body, words("u32"), threads=32, dynamic_bytes=4096, counts=counts)
        assert counts.total["wavefronts"] == wavefronts


def test_wavefronts_of_copies_are_counted():
    """Words one after the other, for two warps; where they go to counts, not where they come from."""
    counts = Counts()
    run(f"{COPY} cp.async.wait_group 0;", words("u32"), counts=counts)
    assert counts.total["wavefronts"] == 2


def test_wavefronts_of_words_are_counted():
    for shift, wavefronts in ((2, 2), (7, 64), (3, 4)):  # for two warps
        counts = Counts()
        run(f"shl.b32 %r6, %r1, {shift}; ld.shared.u32 %r7, [%r6];", words("u32"), dynamic_bytes=8192, counts=counts)
        assert counts.total["wavefronts"] == wavefronts


COPY = "cp.async.ca.shared.global [%r5], [%rd4], 4; cp.async.commit_group;"
SHOW = "ld.shared.u32 %r7, [%r5]; st.global.u32 [%rd5], %r7;"


def test_copies_arrive_when_they_are_waited_for():
    given = words("u32")
    np.testing.assert_array_equal(run(f"{COPY} cp.async.wait_group 0; {SHOW}", given), given)
    np.testing.assert_array_equal(run(f"{COPY} cp.async.wait_group 1; {SHOW}", given), np.full(64, 0xFFFFFFFF))
    np.testing.assert_array_equal(run(f"{COPY} {SHOW}", given), np.full(64, 0xFFFFFFFF))
    two = f"{COPY} cp.async.ca.shared.global [%r5+1024], [%rd4], 4; cp.async.commit_group; cp.async.wait_group 1;"
    np.testing.assert_array_equal(run(f"{two} {SHOW}", given), given)


EXCHANGE = """
    st.shared.u32 [%r5], %r1;
    {between}
    xor.b32 %r6, %r3, {by};
    add.u32 %r6, %r6, %r4;
    ld.shared.u32 %r7, [%r6];
    st.global.u32 [%rd5], %r7;
"""


@pytest.mark.parametrize(
    "between, lanes_apart, races",
    [("", 32, True), ("bar.sync 0;", 32, False), ("bar.warp.sync -1;", 32, True), ("", 1, True),
     ("bar.warp.sync -1;", 1, False), ("shfl.sync.bfly.b32 %r8, %r1, 1, 31, -1;", 1, True)],
)  # fmt: skip
def test_races_in_shared_memory(between, lanes_apart, races):
    body = EXCHANGE.format(between=between, by=4 * lanes_apart)
    if races:
        with pytest.raises(Fault, match="race in shared memory: thread .* st.shared.u32"):
            run(body, words("u32"), races=True)
    else:
        np.testing.assert_array_equal(run(body, words("u32"), races=True), np.arange(64) ^ lanes_apart)


@pytest.mark.parametrize(
    "body, message",
    [
        ("ld.global.u32 %r7, [%rd4+2];", "misaligned address"),
        ("ld.global.v4.u32 {%r7, %r8, %r9, %r10}, [%rd4];", "misaligned address"),
        ("mov.u64 %rd6, 0; ld.global.u32 %r7, [%rd6];", "address 0x0"),
        ("ld.shared.u32 %r7, [%r5+4096];", "4 bytes at .* of 4096 of shared memory"),
        ("ld.shared.u32 %r7, [%r5+-8];", "of shared memory"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bra $end; bar.sync 0; $end:", "threads wait in vain"),
        ("setp.lt.u32 %p1, %r1, 8; @%p1 bra $end; shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1; $end:",
         "threads wait in vain"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bra $other; bar.sync 0; ret; $other: bar.sync 0;",
         "threads meet in different barriers"),
        ("shfl.sync.bfly.b32 %r7, %r1, 1, 31, 255;", "a mask that leaves out lanes"),
        ("cp.async.cg.shared.global [%r5], [%rd4], 4;", "unknown copy"),
        ("vabsdiff2.u32.u32.u32 %r7, %r6, %r6, %r6;", "unknown instruction"),
    ],
)  # fmt: skip
def test_faults(body, message):
    with pytest.raises(Fault, match=message):
        run(body, words("u32"))


def test_what_is_not_launched():
    kernel = read_module(HEAD.replace("{", ".maxntid 64, 1, 1\n{", 1) + "ret;\n}\n")["kernel"]
    with pytest.raises(Fault, match="128 threads in a block, where the kernel may have 64"):
        Launch(kernel, (1, 1), 128, 0, bytes(16))
    with pytest.raises(Fault, match="8 bytes of parameters; the kernel has 16"):
        Launch(kernel, (1, 1), 64, 0, bytes(8))


def test_parameters_and_variables_lie_where_ptx_says():
    (kernel,) = read_module(
        """
        .global .align 4 .b8 table[8] = {1, 2, 3, 4, 5, 6, 7, 8};
        .visible .entry k(.param .u8 a, .param .align 8 .b8 b[12], .param .f32 c)
{
        .shared .align 8 .b8 first[12];
        .shared .align 16 .b8 second[16];
        ret;
}
        """.replace("        .global", ".global")
    ).values()
    assert kernel.parameters == {"a": 0, "b": 8, "c": 20} and kernel.parameter_bytes == 24
    assert kernel.code.shared == {"first": 0, "second": 16} and kernel.static_shared_bytes == 32
    assert ctypes.string_at(ctypes.addressof(kernel.globals["table"]), 8) == bytes(range(1, 9))
