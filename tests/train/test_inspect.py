"""Prove that a picture is drawn of what a run attends to, and that odd requests are refused."""

import re

import matplotlib.image
import pytest
import torch

from tritium.data import Tokenizer
from tritium.model import Transformer
from tritium.training.inspect import look, main, shown

TEXT = "def the quick\n\tfox"


@pytest.fixture
def folder(run, tmp_path):
    assert run(tmp_path / "run", "--max-steps", "2", "--save-every", "2") == 0
    run.output()
    return tmp_path / "run"


def test_maps_and_probabilities_are_those_of_the_model(folder, run, tmp_path):
    out = tmp_path / "picture.png"
    main(folder, TEXT, out=out, top=3, device="cpu")
    height, width, _ = matplotlib.image.imread(out).shape
    assert min(height, width) > 300
    model, tokenizer = Transformer.load(folder), Tokenizer.load(folder)
    ids = tokenizer.encode(TEXT)
    p, best = model(torch.tensor([ids]))[0, -1].softmax(-1).topk(3)
    printed = re.findall(r"^ *([\d.]+)%  (.+)$", run.capsys.readouterr().out, re.MULTILINE)
    assert [word for _, word in printed] == [shown(tokenizer, i) for i in best.tolist()]
    assert [float(x) for x, _ in printed] == pytest.approx((100 * p).tolist(), abs=0.06)
    seen = look(model, tokenizer, TEXT)
    weights = model.attention_weights(torch.tensor([ids]))[:, 0]
    torch.testing.assert_close(seen.weights, weights)
    assert len(seen.words) == len(ids)
    assert not any(c in word for word in seen.words for c in " \n\t")
    assert look(model, tokenizer, "").ids == [tokenizer.eot]  # a document begins
    for wrong, message in (
        (dict(text=TEXT * 200), r"text must have at most \d+ tokens, got \d+; shorten it"),
        (dict(layers=(99,)), r"layers must be in \[0, \d+\), got 99"),
        (dict(top=0), "top must be at least 1, got 0"),
        (dict(out=tmp_path / "nowhere" / "a.png"), "Could not draw .*nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            main(folder, **{"text": TEXT, "out": out, "device": "cpu"} | wrong)
