"""`bench static` sees each fault that machine code can have, and says so in its exit code."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tritium.bench.compiled import _machine_code, static
from tritium.bench.compiled._devices import DEVICES
from tritium.bench.compiled._figures import Row, find_trips
from tritium.bench.compiled._tiles import Access, Pass, Program

ROOT = Path(__file__).parents[3]
USAGE = "  REG:40 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0"
LISTING = """
        /*0010*/                   S2R R14, SR_TID.X ;          /* 0x0000000000007919 */
        /*0160*/               @P3 LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0170*/              @!PT LDG.E.U16.CONSTANT R4, desc[UR6][R2.64+0x128] ;
        /*0180*/                   LDGSTS.E.BYPASS.LTC128B.64 [R5], desc[UR6][R2.64] ;
        /*0190*/                   LD.E R4, [R2.64] ;
        /*01a0*/              @UP0 STG.E.EF.128 desc[UR6][R2.64], R8 ;
        /*01b0*/                   STS.128 [R2], R8 ;
        /*01c0*/                   STL [R1], R8 ;
        /*01d0*/                   LDL.64 R8, [R1] ;
        /*01e0*/                   REDUX.SUM.S32 UR4, R2 ;
        /*01f0*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR6][R2.64], R8 ;
        /*10200*/                  DFMA R2, R4, R6, R8 ;
        /*10210*/                  EXIT ;
"""
# A masked tail in a loop of its own, then the hot loop, with a slow path in it, then padding.
LOOPS = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/               @P1 LDG.E R4, desc[UR6][R2.64] ;
        /*0020*/              @!P0 BRA 0x10 ;
        /*0030*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0040*/               @P2 BRA 0x70 ;
        /*0050*/                   MUFU.RCP R4, R4 ;
        /*0060*/                   FADD R4, R4, R4 ;
        /*0070*/                   STG.E.128 desc[UR6][R2.64], R4 ;
        /*0080*/              @!P0 BRA 0x30 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
        /*00b0*/                   NOP ;
"""
AMD = """
	s_load_dwordx4 s[0:3], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header
	buffer_load_dwordx4 v[2:5], v2, s[4:7], 0 offen
	v_add_f32_e32 v2, v2, v3
	s_cbranch_vccnz .LBB0_3
.LBB0_2:
	global_store_short v6, v2, s[2:3]
	s_cbranch_scc1 .LBB0_1
	s_endpgm
.LBB0_3:
	v_add_f64 v[2:3], v[2:3], v[4:5]
	global_atomic_add_f32 v6, v2, s[2:3]
	s_branch .LBB0_2
	.amdgpu_metadata
    .private_segment_fixed_size: 4
    .vgpr_count:     54
    .vgpr_spill_count: 3
"""
ROW = Row(
    op="op", case="case", kernel="_kernel", target="sm_90", digest="", shared=0, registers=40,
    spills=0, warps=48, loads=(Counter({128: 2}),), stores=(Counter({128: 1}),), bits=(128, 128),
    bytes=(4.0, 2.0), instructions=7.25, issue=0.31, problems=(),
)  # fmt: skip


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def rows(**changed) -> list[Row]:
    return [replace(ROW, target=target, **changed) for target in DEVICES]


def lines(**changed) -> dict:
    return static.lines(rows(**changed))


def test_counts_instructions():
    code = _machine_code.read_sass(USAGE, LISTING)
    assert (code.registers, code.stack, code.spills) == (40, 8, 2)
    assert (code.atomics, code.doubles) == (1, 1)
    assert code.body is not None
    assert code.body.loads == {128: 1, 64: 1, 32: 1, 16: 1}
    assert code.body.stores == {128: 1}
    assert code.loops == []


def test_follows_the_shortest_way_through_each_loop():
    code = _machine_code.read_sass(USAGE, LOOPS)
    tail, hot = code.loops
    assert (tail.instructions, tail.loads, tail.stores) == (2, {32: 1}, {})
    assert (hot.instructions, hot.loads, hot.stores) == (4, {128: 1}, {128: 1})
    assert code.body is not None
    assert code.body.instructions == 8


@pytest.mark.parametrize("swapped", [False, True])
def test_pairs_masked_loops_that_the_compiler_laid_out_in_another_order(swapped):
    """Two alternatives, of which one copies and the other reads twice as much as it writes."""
    ways = [
        [
            Access("load", 64, 32 * (1 + i), True, True, "%x"),
            Access("store", 64, 32, True, True, ""),
        ]
        for i in range(2)
    ]
    loops = [
        "/*0010*/ LDG.E R4, [R2.64] ;", "/*0020*/ STG.E [R2.64], R4 ;", "/*0030*/ @!P0 BRA 0x10 ;",
        "/*0040*/ LDG.E.64 R4, [R2.64] ;", "/*0050*/ STG.E [R2.64], R4 ;",
        "/*0060*/ @!P0 BRA 0x40 ;", "/*0070*/ EXIT ;",
    ]  # fmt: skip
    code = _machine_code.read_sass(USAGE, "\n".join(loops))
    order = [Pass(way, i) for i, way in enumerate(ways[::-1] if swapped else ways)]
    trips = find_trips(Program([[x] for x in order], order), code, 64)
    assert trips is not None
    loads = [trip.route.loads for (trip,) in trips]
    assert loads == ([{64: 1}, {32: 1}] if swapped else [{32: 1}, {64: 1}])


def test_counts_instructions_of_amd():
    code = _machine_code.read_amdgcn(AMD)
    assert (code.registers, code.stack, code.spills) == (54, 4, 3)
    assert (code.atomics, code.doubles) == (1, 1)
    (hot,) = code.loops  # code laid out after the end, that jumps back, is none
    assert (hot.instructions, hot.loads, hot.stores) == (5, {128: 1}, {16: 1})


@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "warps"),
    [
        ("sm_90", 32, 0, 128, 64),  # 64 warps
        (
            "sm_90",
            33,
            0,
            128,
            48,
        ),  # registers come by 8: 40 for each of 32 lanes, 12 warps a quarter
        ("sm_90", 255, 0, 256, 8),
        ("sm_90", 32, 0, 32, 32),  # 32 programs
        ("sm_90", 32, 100_000, 256, 16),  # two programs' shared memory, with 1,024 bytes for CUDA
        ("sm_80", 32, 100_000, 256, 8),
        ("gfx942", 64, 0, 256, 32),
        ("gfx942", 72, 0, 256, 28),
        ("gfx942", 32, 40_000, 256, 4),
    ],
)
def test_resident_warps(target, registers, shared, threads, warps):
    assert DEVICES[target].resident_warps(registers, shared, threads) == warps


def test_finds_each_fault_in_what_triton_compiles():
    done = run("-m", "tests.bench.compiled.faulty_kernels")
    found = json.loads(done.stdout or done.stderr)
    assert found["sm_90"] == {
        "sound": [],
        "spilling": ["spilled registers"],
        "narrow": ["narrow loads"],
        "narrow, and expected so": [],
        "small": [],
        "masked": ["narrow stores"],
        "masked loop": ["narrow loads"],
        "peeled loop": [],
        "atomic": ["atomics"],
        "atomic, and said so": [],
        "double": ["float64 arithmetic"],
        "double, and single": [],
        "more bytes": ["more than 7 bytes per element"],
        "more instructions": ["more than 1 instructions per element"],
        "many threads": [],
    }
    # AMD loads 16 bytes from any multiple of 4; there, instructions have no limit.
    other = {"narrow": [], "more instructions": [], "many threads": ["2048 threads"]}
    assert found["gfx942"] == found["sm_90"] | other
    for target, figures in found["figures"].items():
        sound, peeled = figures["sound"], figures["peeled loop"]
        assert sound["bytes"] == [8, 0]
        assert sound["bits"] == peeled["bits"] == [128, 128]
        assert sound["loads"] == sound["stores"] == [{"128": 4 if target == "sm_90" else 2}]
        assert peeled["bytes"] == [8, 4]  # the second pass reads again what the first has read
        assert [bool(x) for x in peeled["stores"]] == [False, True]
        assert sound["few instructions"]
        assert peeled["few instructions"]


def test_measures_the_operations_of_the_house():
    done = run("-m", "bench", "static", "clip_grad_norm_")
    assert "_grad_norm_clip_kernel" in done.stdout
    assert "Traceback" not in done.stderr, done.stderr


def test_gives_a_figure_for_each_target_where_they_differ():
    found = [replace(row, registers=n) for n, row in zip((40, 41, 42, 43), rows(), strict=True)]
    (line,) = static.lines(found).values()
    cells = dict(zip(static.COLUMNS, line, strict=True))
    assert cells["registers"] == "40 / 41 / 42 / 43"
    assert cells["bits"] == "128 128"
    assert (cells["B/element"], cells["instr/element"], cells["issue, %"]) == ("4 + 2", "7.2", "31")


def test_shows_a_kernel_that_two_cases_launch_once():
    assert len(static.lines([*rows(), *rows(case="other")])) == 1
    assert len(static.lines([*rows(), *rows(case="other", digest="other")])) == 2


def test_the_kept_table_is_read_as_it_was_written():
    found = lines() | lines(op="op2", problems=("atomics",))
    version, again = static.read_tables(static.write_tables(found))
    assert version == static.triton.__version__
    assert again == found


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({}, None),
        ({"bits": (128, 32)}, "op, case, _kernel: bits 128 128 → 128 32"),
        ({"spills": 2}, "op, case, _kernel: spills 0 → 2"),
        ({"bytes": (6.0, 0.0)}, "op, case, _kernel: B/element 4 + 2 → 6"),
        ({"problems": ("atomics",)}, "op, case, _kernel: problems – → atomics"),
        ({"registers": 41}, "op, case, _kernel: registers 40 → 41"),
        ({"kernel": "_new"}, "op, case, _new: is new"),
    ],
)
def test_finds_a_stale_table(changed, difference):
    found = static.compare(lines(**changed), static.write_tables(lines()), ["op"])
    assert (difference in found) if difference else not found
    if "kernel" in changed:
        assert "op, case, _kernel: is kept, but no longer launched" in found


def test_another_compiler_may_use_other_registers():
    kept = static.write_tables(lines()).replace(static.triton.__version__, "3.5.0")
    assert not static.compare(lines(registers=41, instructions=8.0, warps=40), kept, ["op"])
    assert not static.compare(lines(spills=1, problems=(static.SPILLS,)), kept, ["op"])
    assert not static.compare(lines() | lines(kernel="_new"), kept, ["op"])
    assert static.compare(lines(bits=(128, 32)), kept, ["op"])
    assert not static.compare(lines(bytes=(4.0, 0.0)), kept, ["op"])
    assert static.compare(lines(bytes=(4.0, 3.0)), kept, ["op"])


def test_compares_only_the_operations_that_it_measured():
    kept = static.write_tables(lines() | lines(op="op2"))
    assert not static.compare(lines(), kept, ["op"])
    assert static.compare(lines(), kept, ["op", "op2"])


@pytest.mark.parametrize(
    ("changed", "kept", "code", "said"),
    [
        ({}, {}, 0, ""),
        ({"problems": ("atomics",)}, {"problems": ("atomics",)}, 1, "_kernel, sm_90: atomics"),
        ({}, {"bits": (128, 16)}, 1, "run `python -m tritium.bench static --write` to accept"),
    ],
)
def test_exits_with_1_for_a_broken_limit_or_a_stale_table(
    changed, kept, code, said, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(static.tables, "results", lambda: tmp_path)
    monkeypatch.setattr(static, "measure_all", lambda ops: rows(**changed))
    monkeypatch.setattr(static.knobs.runtime, "interpret", False)
    (tmp_path / "static.md").write_text(static.write_tables(lines(**kept)))
    with pytest.raises(SystemExit) as exit:
        static.main()
    assert exit.value.code == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("tried", "code"), [(static.TRIED, 1), (("3.5",), 0)])
def test_spills_break_the_gate_under_every_version_tried(
    tried, code, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(static.tables, "results", lambda: tmp_path)
    monkeypatch.setattr(
        static, "measure_all", lambda ops: rows(spills=2, problems=(static.SPILLS,))
    )
    monkeypatch.setattr(static, "TRIED", tried)
    monkeypatch.setattr(static.knobs.runtime, "interpret", False)
    kept = static.write_tables(lines()).replace(static.triton.__version__, "3.5.0")
    (tmp_path / "static.md").write_text(kept)
    with pytest.raises(SystemExit) as exit:
        static.main()
    assert exit.value.code == code
    assert ("only shown" in capsys.readouterr().err) is (code == 0)


def test_writes_the_table_on_request(monkeypatch, tmp_path):
    monkeypatch.setattr(static.tables, "results", lambda: tmp_path)
    monkeypatch.setattr(static, "measure_all", lambda ops: rows())
    monkeypatch.setattr(static.knobs.runtime, "interpret", False)
    for write, code in ((False, 1), (True, 0), (False, 0)):
        with pytest.raises(SystemExit) as exit:
            static.main(write=write)
        assert exit.value.code == code
