"""Faults of model/attention.py and model/masks.py: tokens see too much, too little, or wrongly."""

from functools import partial

from tests.mutants import Mutant

_attention = partial(Mutant, file="model/attention.py")
_masks = partial(Mutant, file="model/masks.py")

MUTANTS = [
    _attention(
        what="scores scaled by K",
        original="int(q_BHLK.shape[-1]) ** -0.5",
        replacement="1 / int(q_BHLK.shape[-1])",
    ),
    _attention(
        what="a softcap before the scale",
        original="(scores_BHLS * (scale / softcap)).tanh(), 1.0",
        replacement="(scores_BHLS / softcap).tanh(), scale",
    ),
    _attention(
        what="a softcap that only bounds",
        original="softcap * (scores_BHLS * (scale / softcap)).tanh(), 1.0",
        replacement="(scores_BHLS * scale).clamp(-softcap, softcap), 1.0",
    ),
    _attention(
        what="a mask that is left out",
        original="    if mask_BHLS is not None:\n        scores_BHLS = scores",
        replacement="    if False:\n        scores_BHLS = scores",
    ),
    _attention(
        what="heads of another group's keys",
        original="x_BHLS.unflatten(1, (y_BGSK.shape[1], -1)) @",
        replacement="x_BHLS.unflatten(1, (-1, y_BGSK.shape[1])).transpose(1, 2) @",
    ),
    _attention(
        what="no softcap where SDPA is asked for",
        original='if softcap is None and by == "sdpa":',
        replacement='if by == "sdpa":',
    ),
    _attention(
        what="a causal mask that begins at the first key",
        original="device=q_BHLK.device).tril(S - L)",
        replacement="device=q_BHLK.device).tril()",
    ),
    _attention(
        what="FlexAttention without its softcap",
        original="score_mod=None if softcap is None else _capped(softcap)",
        replacement="score_mod=None",
    ),
    _attention(
        what="FlexAttention's softcap half as wide",
        original="return softcap * torch.tanh(score / softcap)",
        replacement="return softcap / 2 * torch.tanh(score / softcap * 2)",
    ),
    _masks(
        what="a window of one token more",
        original=".triu(S - L - window + 1)",
        replacement=".triu(S - L - window)",
    ),
    _masks(
        what="a window of one token less behind a cache",
        original="min(S, L + config.window - 1)",
        replacement="max(L, min(S, L + config.window - 2))",
    ),
    _masks(
        what="documents counted from the front",
        original="document_BS[:, document_BS.shape[1] - S :]",
        replacement="document_BS[:, :S]",
    ),
    _masks(
        what="documents that see each other",
        original="return (same_BLS & mask_LS).unsqueeze(1)",
        replacement="return (same_BLS | mask_LS).unsqueeze(1)",
    ),
    _masks(
        what="layers with a window get the other mask",
        original="return Masks(full, make(L, S, device, document_BS, config.window), follows_BL)",
        replacement="return Masks(full, full, follows_BL)",
    ),
    _masks(
        what="a block of queries sees what its last query sees",
        original="some_NM & (first_N[:, None] - last_N < window)",
        replacement="some_NM & (last_N[:, None] - first_N < window)",
    ),
    _masks(
        what="blocks seen whole though a window ends in them",
        original="all_NM & (last_N[:, None] - first_N < window)",
        replacement="all_NM",
    ),
    _masks(
        what="blocks seen whole though a document ends in them",
        original="all_BNM = all_BNM & (last_BN[:, :, None] == first_BN[:, None])",
        replacement="all_BNM = all_BNM & (first_BN[:, :, None] == last_BN[:, None])",
    ),
    _masks(
        what="blocks of other documents are looked at",
        original="some_BNM = some_BNM & (first_BN[:, :, None] <= last_BN[:, None])",
        replacement="some_BNM = some_BNM & True",
    ),
    _masks(
        what="a pair of documents looked up by the wrong row",
        original="(document_BS[b, i] == document_BS[b, j])",
        replacement="(document_BS[0, i] == document_BS[0, j])",
    ),
    _masks(
        what="blocks behind a cache",
        original="        and L == S\n",
        replacement="",
    ),
    _masks(
        what="blocks of heads that are too narrow",
        original="        and config.head_width >= LEAST_WIDTH\n",
        replacement="",
    ),
    _masks(
        what="blocks without a reason",
        original="        and any(x is not None for x in others)\n",
        replacement="",
    ),
]
