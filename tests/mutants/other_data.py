"""Faults of a resume with other data: losses of one text are compared with those of another."""

from functools import partial

from tests.mutants import Mutant

_print = partial(Mutant, file="training/run/fingerprint.py")

MUTANTS = [
    _print(
        what="other data not noticed",
        original='for name in ("data", "tokenizer"))',
        replacement='for name in ("tokenizer",))',
    ),
    _print(
        what="another tokenizer not noticed",
        original='for name in ("data", "tokenizer"))',
        replacement='for name in ("data",))',
    ),
    _print(
        what="another validation split not noticed",
        original='before.get("validation", now["validation"]) == now["validation"]',
        replacement="True",
    ),
    _print(
        what="the best of an older checkpoint always forgotten",
        original='before.get("validation", now["validation"])',
        replacement='before.get("validation")',
    ),
    _print(
        what="another context not noticed",
        original='return config["eval_tokens"], config["model"]["max_seq_len"]',
        replacement='return config["eval_tokens"], 0',
    ),
    _print(
        what="fewer validation tokens not noticed",
        original='return config["eval_tokens"], config["model"]["max_seq_len"]',
        replacement='return 0, config["model"]["max_seq_len"]',
    ),
    Mutant(
        what="the old best kept at a resume",
        file="train.py",
        original="forgotten = state.forget_best(fingerprint)",
        replacement='forgotten = ""',
    ),
    Mutant(
        what="the old best kept at a rollback",
        file="training/recovery.py",
        original="(step, best_of(saved, fingerprint))",
        replacement='(step, saved["best"])',
    ),
    Mutant(
        what="spikes judged by losses of other data after a rollback",
        file="training/recovery.py",
        original='saved["recovery"] if same_data(saved, fingerprint) else {}',
        replacement='saved["recovery"]',
    ),
    Mutant(
        what="the page of runs names the best of other data",
        file="bench/runs/report.py",
        original='and x["step"] > since]',
        replacement="]",
    ),
]
