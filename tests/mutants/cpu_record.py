"""Faults of bench cpu_record: another text, other settings or cores than the protocol's."""

from functools import partial

from tests.mutants import Mutant

_record = partial(Mutant, file="bench/runs/cpu_record.py")
_text = partial(Mutant, file="bench/runs/cpu_text.py")

MUTANTS = [
    _text(
        what="one more byte is held out",
        original="< HELD_OUT\n",
        replacement="<= HELD_OUT\n",
    ),
    _text(
        what="held-out files are copied for training",
        original="known = {name for name, digest in sums.items() if not is_held_out(digest)}",
        replacement="known = {*sums}",
    ),
    _text(
        what="sums are not compared",
        original="if sha256(texts[name]).hexdigest() != digest:",
        replacement="if False:",
    ),
    _text(
        what="files may be missing",
        original="if missing or changed:",
        replacement="if changed:",
    ),
    _text(
        what="a copy is taken as it is",
        original="elif file.read_bytes() != texts[name]:",
        replacement="elif False:",
    ),
    _text(
        what="a copy may hold more",
        original="if more := sorted(there - known):",
        replacement="if more := sorted(known - there):",
    ),
    _text(
        what="any split will do",
        original="if found != SPLIT:",
        replacement="if found.keys() != SPLIT.keys():",
    ),
    _record(
        what="settings of the protocol may be changed",
        original='if x.split(":")[0].split(".")[0] in FIXED]',
        replacement='if x.split(":")[0].split(".")[0] in ()]',
    ),
    _record(
        what="a tokenizer of another text",
        original="if config.tokenizer not in (None, CHARACTERS):",
        replacement="if False:",
    ),
    _record(
        what="threads of one core are two cores",
        original="found.setdefault(core, cpu)",
        replacement="found[(*core, str(cpu))] = cpu",
    ),
    _record(
        what="a container's quota is not asked",
        original="have = min(len(found), usable_cores())",
        replacement="have = len(found)",
    ),
    _record(
        what="waiting threads cost nothing",
        original="/ (ran + waited)",
        replacement="/ ran",
    ),
    _record(
        what="what a hypervisor took was run",
        original="max(0.0, ran - self.stolen)",
        replacement="ran",
    ),
    _record(
        what="time stolen since the start of the machine",
        original="self.stolen += self._stolen() - before",
        replacement="self.stolen += self._stolen()",
    ),
    _record(
        what="time stolen of every core",
        original='int(fields[f"cpu{x}"][STEAL]) for x in self.cores',
        replacement='int(fields["cpu"][STEAL]) for x in self.cores',
    ),
    _record(
        what="without counts all is well",
        original="        if not ran:\n",
        replacement="        if ran < 0:\n",
    ),
    _record(
        what="bits per token",
        original="n_bytes += len(text.encode())",
        replacement="n_bytes += len(ids)",
    ),
    _record(
        what="bits per character",
        original="n_bytes += len(text.encode())",
        replacement="n_bytes += len(text)",
    ),
    _record(
        what="the first token is not measured",
        original="nats_of(model, [tokenizer.eot, *ids], stride)",
        replacement="nats_of(model, ids, stride)",
    ),
    _record(
        what="the environment's threads",
        original="if not k.startswith(CLEARED)}",
        replacement="}",
    ),
    _record(
        what="other runs' results",
        original="to_json([PROTOCOL, code_version(), given, cpu_name(), cores])",
        replacement="to_json([PROTOCOL, code_version(), cpu_name(), cores])",
    ),
    _record(
        what="runs are made again",
        original='once(out, f"{digest} {seed}"',
        replacement='once(out, f"{digest} {seed} {time.time()}"',
    ),
    _record(
        what="two seeds are enough",
        original="at_least(LEAST_SEEDS, seeds=seeds)",
        replacement="at_least(2, seeds=seeds)",
    ),
    _record(
        what="what diverged is measured",
        original="    if lines is None:\n",
        replacement="    if False:\n",
    ),
    _record(
        what="entries that nobody asked for",
        original="        if write:\n",
        replacement="        if True:\n",
    ),
    _record(
        what="the table is left as it was",
        original='ENTRIES)}")\n            _write_page()\n',
        replacement='ENTRIES)}")\n',
    ),
    _record(
        what="changed code is not noticed",
        original="return said[0], bool(said[1])",
        replacement="return said[0], False",
    ),
]
