"""Faults of keys and values that know the token before: whose, of which columns, and kept for."""

from functools import partial

from tests.mutants import Mutant

_shift = partial(Mutant, file="model/token_shift.py")
_cache = partial(Mutant, file="model/kv_cache.py")
_model = partial(Mutant, file="model/transformer.py")

MUTANTS = [
    _shift(
        what="the token after",
        original="F.pad(x_BLMK, (0, 0, 0, 0, 1, 0))[:, :-1]",
        replacement="F.pad(x_BLMK, (0, 0, 0, 0, 0, 1))[:, 1:]",
    ),
    _shift(
        what="the last token before the first",
        original="F.pad(x_BLMK, (0, 0, 0, 0, 1, 0))[:, :-1]",
        replacement="x_BLMK.roll(1, 1)",
    ),
    _shift(
        what="queries are shifted too",
        original="return torch.cat((q_BLHK, shifted_BLMK), 2)",
        replacement="return torch.cat((q_BLHK + preceding(q_BLHK), shifted_BLMK), 2)",
    ),
    _shift(
        what="the document before is seen",
        original="if follows_BL is not None:",
        replacement="if False:",
    ),
    _shift(
        what="columns of one head for all",
        original="self.weight.view(n_shifted, -1)",
        replacement="self.weight.view(n_shifted, -1)[:1]",
    ),
    _shift(
        what="rounded to the dtype of the weight",
        original=".to(u_BLMK.dtype)",
        replacement=".to(weight_MK.dtype)",
    ),
    _cache(
        what="nothing is before a part",
        original="return u_BSMK[:, :-1] if self.length else preceding(u_BSMK)",
        replacement="return preceding(u_BLMK)",
    ),
    _cache(
        what="a layer's keys are overwritten by what is projected",
        original="self.append(self.n_layers + i, u_BLMK, u_BLMK[:, :, :0])",
        replacement="self.append(self.n_layers, u_BLMK, u_BLMK[:, :, :0])",
    ),
    _cache(
        what="the last projected is forgotten",
        original="self._windows += [2] *",
        replacement="self._windows += [1] *",
    ),
    _cache(
        what="all that was projected is kept",
        original="self._windows += [2] *",
        replacement="self._windows += [None] *",
    ),
    _cache(
        what="a replayed step sees what was at its own place",
        original="index_select(1, self.place_1 - 1)",
        replacement="index_select(1, self.place_1)",
    ),
    _cache(
        what="a replayed step keeps nothing",
        original="        held.keys.index_copy_(1, self.place_1, u_B1MK.to(held.keys.dtype))\n",
        replacement="",
    ),
    _model(
        what="a replayed step sees padding before the first token",
        original="cursor.position() > 0 if self.config.token_shift else None",
        replacement="None",
    ),
    _model(
        what="a cache without room for it is taken",
        original="if self.config.token_shift and not cache.token_shift:",
        replacement="if False:",
    ),
    Mutant(
        file="model/masks.py",
        what="tokens before are of the front of the row",
        original="positions_BS[:, positions_BS.shape[1] - L :] != 0",
        replacement="positions_BS[:, :L] != 0",
    ),
    Mutant(
        file="model/native.py",
        what="written into a layout that does not know it",
        original='        "token_shift": False, "norm"',
        replacement='        "norm"',
    ),
]
