"""Faults of stop tokens: a row draws on, ends early, or is cut elsewhere than at its first one."""

from functools import partial

from tests.mutants import Mutant

_sampling = partial(Mutant, file="model/sampling.py")
_decoding = partial(Mutant, file="model/decoding.py")

MUTANTS = [
    _sampling(
        what="an id behind the vocabulary stops nothing",
        original="if not 0 <= stop < V:",
        replacement="if not 0 <= stop <= V:",
    ),
    _sampling(
        what="a negative id stops nothing",
        original="if not 0 <= stop < V:",
        replacement="if not stop < V:",
    ),
    _sampling(
        what="the id 0 refused",
        original="if not 0 <= stop < V:",
        replacement="if not 0 < stop < V:",
    ),
    _sampling(
        what="ids that an iterable gives once taken twice",
        original="    stop_tokens = stop_ids(stop_tokens)\n    drawn = stream(",
        replacement="    drawn = stream(",
    ),
    _sampling(
        what="stop tokens kept to itself",
        original="    stops = torch.tensor(stop_tokens, dtype",
        replacement="    stops = torch.tensor([], dtype",
    ),
    _sampling(
        what="a list's rows cut in front of their stop tokens",
        original="ends_BL.sum(1) + 1)",
        replacement="ends_BL.sum(1))",
    ),
    _sampling(
        what="a list's rows end when the last one does",
        original="torch.cat((prompt, added[:n]))",
        replacement="torch.cat((prompt, added))",
    ),
    _sampling(
        what="a list's rows cut at one stop token of several",
        original="torch.isin(added_BL, added_BL.new_tensor(stop_tokens))",
        replacement="torch.isin(added_BL, added_BL.new_tensor(stop_tokens[:1]))",
    ),
    _sampling(
        what="text is written on behind its end",
        original="stop_tokens=[tokenizer.eot],",
        replacement="stop_tokens=[],",
    ),
    _sampling(
        what="the end of the text is named",
        original="        if i == tokenizer.eot:\n            continue\n",
        replacement="",
    ),
    _decoding(
        what="the prompt stops",
        original="torch.zeros_like(self._token_B1, dtype=torch.bool)",
        replacement="torch.isin(self._token_B1, stops)",
    ),
    _decoding(
        what="only a token that is all stop tokens stops",
        original="== self._stops).any(-1)",
        replacement="== self._stops).all(-1)",
    ),
    _decoding(
        what="a row's stop token stops all rows",
        original="self._stopped_B1 |= (token_B1.unsqueeze(-1) == self._stops).any(-1)",
        replacement="self._stopped_B1 |= (token_B1.unsqueeze(-1) == self._stops).any()",
    ),
    _decoding(
        what="a row that has ended draws on",
        original="torch.where(self._stopped_B1, self._token_B1, token_B1)",
        replacement="token_B1",
    ),
    _decoding(
        what="the first row that ends ends the others",
        original="flags = self._count, self._stopped_B1.all(), self._is_odd",
        replacement="flags = self._count, self._stopped_B1.any(), self._is_odd",
    ),
    _decoding(
        what="rows that have ended are drawn on to the most tokens",
        original="        if ended:\n            return\n",
        replacement="",
    ),
    _decoding(
        what="fractions taken for ids",
        original="[*map(index, stop_tokens)]",
        replacement="[*map(int, stop_tokens)]",
    ),
    _decoding(
        what="what are no ids refused without a sentence",
        original="    except TypeError as error:\n        raise ValueError(\n"
        '            f"generate: stop_tokens',
        replacement="    except OverflowError as error:\n        raise ValueError(\n"
        '            f"generate: stop_tokens',
    ),
]
