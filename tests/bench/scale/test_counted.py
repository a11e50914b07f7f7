"""Prove that predicted bytes are those that a step on two ranks of gloo sends and keeps."""

import pytest
import torch

from tritium.bench.scale import check
from tritium.bench.scale.links import KINDS
from tritium.bench.scale.predict import moved

pytestmark = pytest.mark.usefixtures("references")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd's threads of a GPU do not fork")
@pytest.mark.parametrize(
    ("mode", "micro_batch", "policy"),
    [("ddp", 1, "full"), ("fsdp", 2, "none"), ("tp", 2, "selective")],
)
def test_a_step_on_two_ranks_is_predicted(mode, micro_batch, policy):
    # What is sent and kept is exact, the peak within 5 %: torch decides which of a block's buffers
    # are alive at once. By references the loss of a whole head, of which a peak of tp is predicted,
    # has all logits at once; that of a split head has a chunk.
    plan = check.predicted(mode, 2, micro_batch, policy)
    counts = check.counted(mode, 2, micro_batch, policy)
    assert {kind: counts.moved.get(kind, 0) for kind in KINDS} == pytest.approx(moved(plan))
    row = check.Row(plan, counts)
    assert row.exact if mode == "tp" else row.right, (plan.memory, counts)
