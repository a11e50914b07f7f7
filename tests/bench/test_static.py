"""`bench static` sees each fault that machine code can have, and says so in its exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import static
from bench.__main__ import main

ROOT = Path(__file__).parents[2]
LISTING = """
 Function _kernel:
  REG:40 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0
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
"""


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_counts_instructions():
    code = static.read_code(LISTING)
    assert (code.registers, code.stack, code.spills) == (40, 8, 2)
    assert (code.atomics, code.doubles) == (1, 1)
    assert code.loads == {128: 1, 64: 1, 32: 1, 16: 1}
    assert code.stores == {128: 1}


def test_finds_each_fault_in_what_triton_compiles():
    done = run("-m", "tests.bench.faulty_kernels")
    assert json.loads(done.stdout or done.stderr) == {
        "sound": [],
        "spilling": ["spilled registers"],
        "narrow": ["narrow loads"],
        "narrow, and expected so": [],
        "small": [],
        "masked": ["narrow stores"],
        "atomic": ["atomics"],
        "double": ["float64 arithmetic"],
        "double, and exempt": [],
    }


def test_measures_the_operations_of_the_house():
    done = run("-m", "bench", "static", "clip_grad_norm_")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_grad_norm_clip_kernel" in done.stdout


@pytest.mark.parametrize(("problems", "code"), [((), 0), (("atomics",), 1)])
def test_exits_with_1_for_a_broken_limit(problems, code, monkeypatch, capsys):
    found = static.read_code(LISTING)
    rows = [static.Row("op", "case", "_kernel", n, 0, found, problems) for n in (80, 90, 100)]
    monkeypatch.setattr(static, "measure_all", lambda ops: rows)
    monkeypatch.setattr(static.knobs.runtime, "interpret", False)
    with pytest.raises(SystemExit) as exit:
        static.main()
    assert exit.value.code == code
    assert ("op, case, _kernel, sm_90: atomics" in capsys.readouterr().err) == bool(problems)


def test_refuses_an_unknown_operation():
    with pytest.raises(SystemExit, match="no operation"):
        static.main(("nonsense",))


@pytest.mark.parametrize(("words", "code"), [([], 0), (["nonsense"], 2)])
def test_lists_the_verbs(words, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == code
    assert "static" in capsys.readouterr().out
