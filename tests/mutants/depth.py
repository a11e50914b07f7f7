"""Faults of --depth: a law that is not the published one, or a flag that does not win."""

from functools import partial

from tests.mutants import Mutant

_depth = partial(Mutant, file="training/depth.py")
_line = partial(Mutant, file="training/command_line.py")

MUTANTS = [
    _depth(
        what="the exponent of the critical batch",
        original="BATCH_EXPONENT = 0.383",
        replacement="BATCH_EXPONENT = 0.462",
    ),
    _depth(
        what="heads of 128",
        original="n_heads=depth,",
        replacement="n_heads=max(1, depth // 2),",
    ),
    _depth(
        what="an embedding counts where it multiplies nothing",
        original="embedding = 0 if model.tie_embeddings else",
        replacement="embedding = 0 if True else",
    ),
    _depth(
        what="rates grow with width",
        original="narrower = usual.model.d_model / config.model.d_model",
        replacement="narrower = config.model.d_model / usual.model.d_model",
    ),
    _depth(
        what="rates in proportion to the batch",
        original="schedule.learning_rate * sqrt(larger * narrower)",
        replacement="schedule.learning_rate * larger * sqrt(narrower)",
    ),
    _depth(
        what="Muon's rate stays",
        original="muon_learning_rate=muon * sqrt(larger * width)",
        replacement="muon_learning_rate=muon",
    ),
    _depth(
        what="the original Muon's rate falls with width",
        original='if optimizer.adjust_lr_fn == "original" else',
        replacement="if False else",
    ),
    _depth(
        what="a decay that a longer run does not lower",
        original="* (before / now) / longer",
        replacement="* (before / now)",
    ),
    _depth(
        what="a decay that other rates do not change",
        original="* larger * (before / now)",
        replacement="* larger",
    ),
    _depth(
        what="the rate given is not the one that decay follows",
        original="now = optimizer.muon_learning_rate or schedule.learning_rate",
        replacement="now = before * sqrt(larger * narrower)",
    ),
    _depth(
        what="the batch of the law's tokens where steps are given",
        original="    if asked.max_steps:\n        growth",
        replacement="    if False:\n        growth",
    ),
    _depth(
        what="decay of the law's tokens where steps are given",
        original="tokens = asked.max_steps * batch * context",
        replacement="pass",
    ),
    _depth(
        what="a warm-up of a short run's whole length",
        original="warmup_steps=min(schedule.warmup_steps, steps // WARM_UP)",
        replacement="warmup_steps=schedule.warmup_steps",
    ),
    _depth(
        what="a batch given does not win",
        original='if "batch-size" not in given:',
        replacement="if True:",
    ),
    _depth(
        what="a learning rate given does not win",
        original='if "learning-rate" not in given:',
        replacement="if True:",
    ),
    _depth(
        what="a decay given does not win",
        original='if "weight-decay" not in given:',
        replacement="if True:",
    ),
    _depth(
        what="minutes given do not win",
        original='"max-epochs", "max-minutes"}',
        replacement='"max-epochs"}',
    ),
    _line(
        what="a resumed run is fitted once more",
        original='if given.get("resume", ["False"]) != ["False"]:',
        replacement="if False:",
    ),
    _line(
        what="a named shape is overruled",
        original='if given.get("shape", ["None"]) != ["None"]:\n        raise',
        replacement="if False:\n        raise",
    ),
    _line(
        what="the weights that a run begins with have another shape",
        original='{"tokenizer", "shape", "depth"}',
        replacement='{"tokenizer", "shape"}',
    ),
    _line(
        what="the preset's values are those of the depth",
        original="fit_to_depth(config, begun, given)",
        replacement="fit_to_depth(config, usual, given)",
    ),
]
