"""Faults of the default run of a GPU: too large, too long, or not what was asked for."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="training/card.py")

MUTANTS = [
    _mutant(what="the time not kept", original="SECONDS * UTILIZATION", replacement="2 * SECONDS"),
    _mutant(
        what="text read as often as there is time",
        original="return min(in_time, MOST_EPOCHS * corpus_tokens)",
        replacement="return in_time",
    ),
    _mutant(
        what="text read once at most",
        original="min(in_time, MOST_EPOCHS * corpus_tokens)",
        replacement="min(in_time, corpus_tokens)",
    ),
    _mutant(
        what="memory taken to the last byte",
        original="left = USABLE * card.memory",
        replacement="left = card.memory",
    ),
    _mutant(
        what="states of the optimizer forgotten",
        original=" - BYTES_PER_PARAMETER * _parameters(shape)",
        replacement="",
    ),
    _mutant(
        what="activations of one block",
        original="BYTES_PER_FEATURE * shape.n_layers * shape",
        replacement="BYTES_PER_FEATURE * shape",
    ),
    _mutant(
        what="the smallest shape for all",
        original="shape = next(fitting, shapes[-1])",
        replacement="shape = shapes[-1]",
    ),
    _mutant(
        what="the largest shape for all",
        original="shape = next(fitting, shapes[-1])",
        replacement="shape = shapes[0]",
    ),
    _mutant(
        what="a shape whose step does not fit",
        original="return enough and _sequences(shape, card) >= 1",
        replacement="return enough",
    ),
    _mutant(
        what="a shape that sees too little",
        original="return enough and",
        replacement="return",
    ),
    _mutant(
        what="a micro-batch that does not divide the batch",
        original="even = max(n for n in range(1, most + 1) if batch % n == 0)",
        replacement="even = most",
    ),
    _mutant(
        what="few steps of a large batch",
        original="tokens >= LEAST_STEPS * n * length",
        replacement="tokens >= n * length",
    ),
    _mutant(
        what="the vocabulary of the data taken for a shape",
        original="replace(config.model, vocab_size=usual.model.vocab_size) != usual.model",
        replacement="config.model != usual.model",
    ),
    _mutant(
        what="a shape that was set replaced",
        original="[config.model] if own_shape else [",
        replacement="[",
    ),
    _mutant(
        what="a batch that was set replaced",
        original="    if batch == usual.batch_size:",
        replacement="    if True:",
    ),
    _mutant(
        what="a micro-batch that was set replaced",
        original="    if memory.micro_batch_size == usual.memory.micro_batch_size:",
        replacement="    if True:",
    ),
    _mutant(
        what="a length that was set replaced",
        original="    if free_length:",
        replacement="    if True:",
    ),
    _mutant(
        what="a warm-up that was set replaced",
        original="        if config.schedule == usual.schedule:",
        replacement="        if True:",
    ),
    _mutant(
        what="intervals that were set replaced",
        original="        if config.eval_every == usual.eval_every:",
        replacement="        if True:",
    ),
    _mutant(
        what="a warm-up longer than a short run",
        original="min(config.schedule.warmup_steps, steps // WARM_UP)",
        replacement="config.schedule.warmup_steps",
    ),
]
