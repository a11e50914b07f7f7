"""Faults of model/decoding.py, replay.py, and of the cursor of model/kv_cache.py."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="model/decoding.py")
_replay = partial(Mutant, file="model/replay.py")
_cursor = partial(Mutant, file="model/kv_cache.py")

MUTANTS = [
    _mutant(
        what="the last token of the prompt is overwritten",
        original="tokens_BL[:, -1:].to(torch.long, copy=True)",
        replacement="tokens_BL[:, -1:].long()",
    ),
    _mutant(
        what="the same token is returned again and again",
        original="token_B1 = self._token_B1.clone()",
        replacement="token_B1 = self._token_B1",
    ),
    _mutant(
        what="a graph finds the token elsewhere",
        original="self._token_B1.copy_(token_B1)",
        replacement="self._token_B1 = token_B1",
    ),
    _mutant(
        what="tokens that are drawn are not seen",
        original="self._seen_BV.scatter_(1, token_B1, True)",
        replacement="pass",
    ),
    _mutant(
        what="a row that has ended draws on",
        original="torch.where(self._stopped_B1, self._token_B1, token_B1)",
        replacement="token_B1",
    ),
    _mutant(
        what="a row ends, and begins again",
        original="self._stopped_B1 |= (token",
        replacement="self._stopped_B1 = (token",
    ),
    _mutant(
        what="tokens behind the end of all rows count",
        original="self._count += ~self._stopped_B1.all()",
        replacement="self._count += 1",
    ),
    _mutant(
        what="the first row ends all",
        original="self._count += ~self._stopped_B1.all()",
        replacement="self._count += ~self._stopped_B1.any()",
    ),
    _mutant(
        what="logits that are no numbers pass",
        original="self._is_odd |= ~logits_BV.amax(-1).isfinite().all()",
        replacement="self._is_odd |= False",
    ),
    _mutant(
        what="the context is read anew by another length",
        original="max(1, self._limit // 2)",
        replacement="max(1, self._limit // 2 + 1)",
    ),
    _mutant(
        what="a full cache is written on",
        original="self._cache.length + 1 > self._limit",
        replacement="self._cache.length > self._limit",
    ),
    _mutant(
        what="the memory moves where the context is read anew",
        original="        self._cache.truncate(0)\n        return self._cache",
        replacement="        return self._model.new_cache(self._cache.max_length, fixed=True)",
    ),
    _mutant(
        what="the cursor stays where it was when the context is read anew",
        original="        cursor.seek(None if",
        replacement="        first or cursor.seek(None if",
    ),
    _mutant(
        what="rows begin where they did in the prompt",
        original="(begin_B1 - first).clamp(min=0))",
        replacement="begin_B1)",
    ),
    _mutant(
        what="the host does not count the tokens",
        original="        cache.length += 1",
        replacement="        pass",
    ),
    _mutant(
        what="each token is written over the one before",
        original="        self._cursor.advance()",
        replacement="        pass",
    ),
    _mutant(
        what="a failed capture is tried again and again",
        original="            self._replay = None\n",
        replacement="",
    ),
    _mutant(
        what="the host looks at every token",
        original="CHECK_EVERY if stops else max_new_tokens",
        replacement="1 if stops else max_new_tokens",
    ),
    _mutant(
        what="a group is given at once, its end or not",
        original="            held = held[: count - given]\n",
        replacement="",
    ),
    _mutant(
        what="dropout is captured",
        original='if getattr(model, "training", False) and',
        replacement="if False and",
    ),
    _replay(
        what="the call that is captured is not made",
        original="            self._graph = self._captured(run)\n        self._graph.replay()",
        replacement="            self._graph = self._captured(run)\n        else:\n"
        "            self._graph.replay()",
    ),
    _replay(
        what="captured at every call",
        original="            self._graph = self._captured(run)\n        self._graph.replay()",
        replacement="            graph = self._captured(run)\n            graph.replay()\n"
        "            return self._results\n        self._graph.replay()",
    ),
    _replay(
        what="the generator is not registered",
        original="if self._generator is not None:",
        replacement="if False:",
    ),
    _cursor(
        what="the token does not see itself",
        original="(self._slot_S <= self.place_1)",
        replacement="(self._slot_S < self.place_1)",
    ),
    _cursor(
        what="what is not written yet is seen",
        original="(self._slot_S <= self.place_1)",
        replacement="(self._slot_S <= self.place_1 + 1)",
    ),
    _cursor(
        what="padding is seen",
        original=" & (self._slot_S >= self._begin_B1)",
        replacement="",
    ),
    _cursor(
        what="a window of one token more behind a cursor",
        original="(self._slot_S > self.place_1 - window)",
        replacement="(self._slot_S >= self.place_1 - window)",
    ),
    _cursor(
        what="the window shows padding",
        original="return full_B11S, full_B11S & (",
        replacement="return full_B11S, (",
    ),
    _cursor(
        what="places are counted from the padding",
        original="(self.place_1 - self._begin_B1).clamp(min=0)",
        replacement="self.place_1.unsqueeze(0)",
    ),
    _cursor(
        what="memory of a fixed cache is not cleared",
        original="            v_BSGK.zero_()\n",
        replacement="",
    ),
    _cursor(
        what="a fixed cache forgets what is outside of a window",
        original="if window is not None and not self._fixed:",
        replacement="if window is not None:",
    ),
    _cursor(
        what="a token is read at a place of the host",
        original="x_BSGK.index_copy_(1, self.place_1, x_B1GK.to(x_BSGK.dtype))",
        replacement="x_BSGK[:, self.cache.length : self.cache.length + 1] = x_B1GK",
    ),
]
