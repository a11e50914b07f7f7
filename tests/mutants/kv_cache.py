"""Faults of model/kv_cache.py: what is kept is lost, or what is forgotten is read."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="model/kv_cache.py")

MUTANTS = [
    _mutant(
        what="a window of one token more",
        original="max(0, length - window + 1)",
        replacement="max(0, length - window)",
    ),
    _mutant(
        what="a window of one token less",
        original="max(0, length - window + 1)",
        replacement="max(0, min(length, length - window + 2))",
    ),
    _mutant(
        what="memory is never made anew",
        original="if held is None or end - held.first > held.keys.shape[1]:",
        replacement="if held is None:",
    ),
    _mutant(
        what="a window that never forgets",
        original="        if window is not None and not self._fixed:\n            room = min",
        replacement="        if False:\n            room = min",
    ),
    _mutant(
        what="memory for one window",
        original="max(2 * window,",
        replacement="max(window,",
    ),
    _mutant(
        what="what the next tokens see is not copied",
        original="        if held is not None:\n            seen, n",
        replacement="        if False:\n            seen, n",
    ),
    _mutant(
        what="copied from the front",
        original="slice(oldest - held.first, self.length - held.first), self.length - oldest",
        replacement="slice(0, self.length - oldest), self.length - oldest",
    ),
    _mutant(
        what="new memory begins where the old did",
        original="return _Held(oldest, k_BSGK, v_BSGK)",
        replacement="return _Held(0 if held is None else held.first, k_BSGK, v_BSGK)",
    ),
    _mutant(
        what="keys for values",
        original="held.keys[:, seen], held.values[:, seen]",
        replacement="held.keys[:, seen], held.keys[:, seen]",
    ),
    _mutant(
        what="more keys are returned than are seen",
        original="x_BSGK[:, oldest - first : end - first] for",
        replacement="x_BSGK[:, : end - first] for",
    ),
    _mutant(
        what="new tokens overwrite the last",
        original="x_BSGK[:, begin - first : end - first] = x_BLGK",
        replacement="x_BSGK[:, max(0, begin - first - 1) : end - first] = x_BLGK[:, :1]",
    ),
    _mutant(
        what="a cache that forgot all remembers where it was",
        original="self._layers[i] = held._replace(first=0)",
        replacement="pass",
    ),
    _mutant(
        what="what a window has forgotten may be read",
        original="elif held is not None and self._oldest(i, length) < held.first:",
        replacement="elif False:",
    ),
    _mutant(
        what="positions continue from 0",
        original="last_B1 = position_BS[:, start - 1 : start] if start else -1",
        replacement="last_B1 = -1",
    ),
    _mutant(
        what="late positions forget the document before them",
        original="self._position_BS = place_S.repeat(B, 1)",
        replacement="self._position_BS = place_S.repeat(B, 1) * 0",
    ),
    _mutant(
        what="more tokens than there is room for",
        original="if start + L > self.max_length:",
        replacement="if False:",
    ),
    _mutant(
        what="another number of rows",
        original="if self._rows not in (None, B):",
        replacement="if False:",
    ),
    _mutant(
        what="keys overwritten that a backward pass reads",
        original="if not self._fixed and _gets_gradients(k_BLGK",
        replacement="if False and _gets_gradients(k_BLGK",
    ),
    _mutant(
        what="no gradient through the tokens before",
        original="(torch.cat((x[:, seen], new.to",
        replacement="(torch.cat((x[:, seen].detach(), new.to",
    ),
    _mutant(
        what="positions overwritten that a backward pass reads",
        original="[:, : start + L].clone()",
        replacement="[:, : start + L]",
    ),
    Mutant(
        file="model/transformer.py",
        what="blocks recomputed with a cache",
        original='policy = self.activation_checkpointing if cache is None else "none"',
        replacement="policy = self.activation_checkpointing",
    ),
    Mutant(
        file="model/reversible.py",
        what="half-blocks recomputed with a cache",
        original="        cache is None\n        and torch.is_grad",
        replacement="        torch.is_grad",
    ),
]
