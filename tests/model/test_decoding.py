"""Prove that tokens drawn by the replay of a graph are those drawn kernel by kernel.

The graphs here are recorded operators, run again (recorded_graph.py); no GPU has replayed one.
"""

import gc
import weakref
from itertools import product

import pytest
import torch
from families import LENGTH, configs, few
from hypothesis import given
from hypothesis import strategies as st
from recorded_graph import RecordedGraph, replace_cuda

from tritium.kernels import runtime
from tritium.model import ModelConfig, Transformer, decoding, sampling
from tritium.model.decoding import CHECK_EVERY, GRAPH_FROM, GraphedDecoding, decoded, obstacle
from tritium.model.kv_cache import Cursor
from tritium.model.replay import WARM_UP
from tritium.model.sampling import generate, sample, stream

SMALL = ModelConfig(
    vocab_size=40, n_layers=3, d_model=16, n_heads=4, n_kv_heads=2, max_seq_len=16, window=5,
    full_every=2,
)  # fmt: skip


def build(config, dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = Transformer(config, **options).eval()
    with torch.no_grad():  # as after training: blocks that matter
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model.to(dtype)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def captured():
    """Recorded graphs for every call of `generate`, as on a GPU; the list of them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = replace_cuda(monkeypatch)
        monkeypatch.setattr(decoding, "obstacle", lambda model, n: None if n > WARM_UP + 1 else "")
        monkeypatch.setattr(sampling, "obstacle", decoding.obstacle)
        yield found


def drawing():
    """Options of `generate`, each of them in every third example or so."""
    return st.fixed_dictionaries(
        {"temperature": st.sampled_from([0, 1.0, 0.7])},
        optional={
            "top_k": st.integers(1, 9), "top_p": st.sampled_from([0.3, 0.9]),
            "min_p": st.sampled_from([0.02, 0.5]),
            "repetition_penalty": st.sampled_from([1.3, 0.8]),
            "stop_tokens": st.lists(st.integers(0, 4), min_size=1, max_size=3),
        },
    )  # fmt: skip


@few
@given(configs(), st.lists(st.integers(1, LENGTH + 3), min_size=1, max_size=3), drawing(),
       st.integers(1, 30), st.booleans())  # fmt: skip
def test_a_replayed_step_draws_what_a_step_draws(captured, config, lengths, options, new, ragged):
    # The first replays are at places and behind prompts that the captured step has not seen; more
    # tokens than the context holds are read again on the way.
    model = build(config)
    lengths = lengths if ragged else [lengths[0]] * len(lengths)
    prompts = [torch.randint(config.vocab_size, (n,)).tolist() for n in lengths]
    captured.clear()
    graphed = generate(model, prompts, new, generator=seeded(3), **options)
    plain = generate(model, prompts, new, generator=seeded(3), cuda_graph=False, **options)
    for x, y in zip(graphed, plain, strict=True):
        assert x.tolist() == y.tolist()
    if "stop_tokens" not in options and new > 2 * LENGTH:  # some are drawn by reading
        (graph,) = captured
        assert graph.replays >= new // 2 - WARM_UP


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(dict(reversible=True), torch.float64), (dict(positions="learned"), torch.float32),
     (dict(window=None, full_every=None, softcap=5.0), torch.bfloat16)],
)  # fmt: skip
def test_other_models_are_replayed_too(config, dtype, captured):
    model = build(ModelConfig(**{**vars(SMALL), **config}), dtype)
    prompts, options = [[1, 2, 3], [4]], dict(temperature=0)
    graphed, plain = (
        generate(model, prompts, 12, cuda_graph=which, **options) for which in (True, False)
    )
    assert [x.tolist() for x in graphed] == [x.tolist() for x in plain]
    for row, prompt in zip(graphed, prompts, strict=True):
        with torch.no_grad():  # each token is the best behind those before it, read at once
            best = model(row[None, :-1])[0].argmax(-1)
        found = best == row[1:]
        assert found[len(prompt) - 1 :].all() or dtype == torch.bfloat16


def step_of(model, prompts, at):
    """A `GraphedDecoding` that is about to draw token number `at`."""
    tokens, begin = sampling._padded(model, prompts)
    draw = sampling._Draw(0.7, 9, 0.9, 0.01, seeded(1), 1.2)
    never = GraphedDecoding(
        model, tokens, begin, 99, draw, torch.tensor([39]), True, generator=seeded(1),
        on_failure=pytest.fail,
    )  # fmt: skip
    never._replay = None
    with torch.no_grad():
        for _ in range(at):
            never.next()
    return never


def test_every_step_is_the_same_operators_on_the_same_shapes():
    model, signatures = build(SMALL), []
    for at, prompts in product((1, 2, 9), ([[1, 2], [3, 4]], [[1, 2, 3, 4, 5], [6, 7]])):
        step, graph = step_of(model, prompts, at), RecordedGraph()
        graph.generators = [step._draw.generator]
        with torch.no_grad(), graph:
            step._one_token()
        signatures.append(graph.signature)
    same_rows, ragged = signatures[::2], signatures[1::2]
    for first, *others in (same_rows, ragged):
        assert all(call == other for x in others for call, other in zip(first, x, strict=True))
    assert len(same_rows[0]) > 100


@pytest.mark.slow
def test_a_step_is_one_graph_of_torch_compile():
    step = step_of(build(ModelConfig(**{**vars(SMALL), "n_layers": 2})), [[1, 2, 3], [4]], 1)
    step._draw = sampling._Draw(0, None, None, None, None, 1.2)
    expected = step_of(step._model, [[1, 2, 3], [4]], 1)
    expected._draw = step._draw
    compiled = torch.compile(step._one_token, fullgraph=True, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            compiled()
            expected._one_token()
            assert torch.equal(step._token_B1, expected._token_B1)


def test_the_host_looks_every_16_tokens(captured, monkeypatch):
    looks, check = [], GraphedDecoding.check

    def counted(self):
        looks.append(self._length)
        return check(self)

    monkeypatch.setattr(GraphedDecoding, "check", counted)
    model = build(ModelConfig(**{**vars(SMALL), "max_seq_len": 99}))
    draw, never = sampling._Draw(1.0, None, None, None, None, 1.0), torch.tensor([100])
    rows = GraphedDecoding(
        model, torch.tensor([[1, 2]]), None, 40, draw, never, False, generator=None,
        on_failure=pytest.fail,
    )  # fmt: skip
    assert len(list(decoded(rows, 40, stops=True, on_cpu=False))) == 40
    assert looks == [2 + CHECK_EVERY, 2 + 2 * CHECK_EVERY, 42]
    looks.clear()
    assert len(list(decoded(rows, 20, stops=False, on_cpu=False))) == 20
    assert len(looks) == 1


@pytest.mark.parametrize("seed", range(3))
def test_rows_end_where_they_do_however_late_the_host_looks(seed, captured, monkeypatch):
    model, prompts = build(SMALL), [[1, 2, 3], [4], [7, 7]]
    found = []
    for every in (1, 3, 16):
        monkeypatch.setattr(decoding, "CHECK_EVERY", every)
        tokens, begin = sampling._padded(model, prompts)
        draw = sampling._Draw(1.0, None, None, None, seeded(seed), 1.0)
        rows = GraphedDecoding(
            model, tokens, begin, 60, draw, torch.arange(0, 40, 6), False,
            generator=draw.generator, on_failure=pytest.fail,
        )  # fmt: skip
        found.append(torch.cat(list(decoded(rows, 60, stops=True, on_cpu=False)), 1).tolist())
    expected = list(stream(model, prompts, 60, stop_tokens=range(0, 40, 6), generator=seeded(seed)))
    assert found == [torch.cat(expected, 1).tolist()] * 3
    assert len(expected) < 60


def test_a_failed_capture_falls_back_with_a_line(captured, monkeypatch):
    model, said = build(SMALL), []
    logits = model.logits
    expected = generate(model, [[1, 2]], 14, temperature=0)
    monkeypatch.setattr(model, "logits", lambda h: (h.sum().item(), logits(h))[1])
    pieces = list(stream(model, [[1, 2]], 14, temperature=0, log=said.append))
    assert torch.cat(pieces, 1)[0].tolist() == expected[0][2:].tolist()
    assert said == [
        "Each token is the replay of a CUDA graph",
        "No CUDA graph is captured: the capture failed: _local_scalar_dense is not "
        "permitted when stream is capturing",
    ]
    with pytest.warns(UserWarning, match="generate: No CUDA graph is captured: the capture failed"):
        generate(model, [[1, 2]], 14, temperature=0)


def test_where_no_graph_is_captured(monkeypatch):
    model = build(SMALL)
    assert obstacle(model, 999) == ""  # on a CPU
    monkeypatch.setattr(Transformer, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert obstacle(model, GRAPH_FROM - 1) == ""
    monkeypatch.setattr(runtime, "REFERENCE", False)
    monkeypatch.setattr(runtime, "_fallen", frozenset())
    assert obstacle(model, GRAPH_FROM) is None
    model.dropout = 0.1
    assert obstacle(model, GRAPH_FROM) is None
    assert "call its eval()" in obstacle(model.train(), GRAPH_FROM)
    monkeypatch.setattr(runtime, "_fallen", frozenset(["softmax"]))
    assert obstacle(model, GRAPH_FROM) == "softmax runs on the reference"
    monkeypatch.setattr(runtime, "REFERENCE", True)
    assert obstacle(model, GRAPH_FROM) == "every operation runs on the reference"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert obstacle(model, GRAPH_FROM) == ""


def test_the_prompt_is_left_as_it_is_and_nothing_outlives_the_call(captured):
    model, tokens = build(SMALL), torch.tensor([[1, 2, 3]])
    captured.clear()
    gc.collect()
    gc.disable()
    try:
        model.generate(tokens, 30)
        (graph,) = captured
        gone = weakref.ref(graph)
        del graph
        captured.clear()
        assert gone() is None
    finally:
        gc.enable()
    assert tokens.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_an_error(cuda_graph, odd, captured):
    model = build(SMALL)
    with torch.no_grad():
        model.norm.weight[0] = odd
    with pytest.raises(RuntimeError, match="generate: logits must be finite"):
        model.generate([[1]], 20, cuda_graph=cuda_graph)


def test_memory_that_no_token_has_written_is_not_read():
    model = build(SMALL)
    cache = model.new_cache(16, fixed=True)
    with torch.no_grad():
        model.hidden(torch.tensor([[1, 2]]), cache)
        cursor = Cursor(cache, rows=False)
        cursor.seek(None)
        assert cursor.place_1.item() == 2
        before = model.next_hidden(torch.tensor([[3]]), cursor)
        for held in cache._layers:
            assert held.keys.shape[1] == 16
            assert not held.values[:, 3:].any()
            held.keys[:, 3:], held.values[:, 3:] = 7, 9
        assert torch.equal(model.next_hidden(torch.tensor([[3]]), cursor), before)


def test_draws_what_multinomial_draws():
    p = torch.rand(50, 30, generator=seeded(1))
    drawn = sample(p.log(), generator=seeded(2))
    sorted_p, ids = (p / p.sum(-1, keepdim=True)).sort(-1, descending=True)
    assert torch.equal(drawn, ids.gather(-1, torch.multinomial(sorted_p, 1, generator=seeded(2))))


def by_whole_passes(model, text, new, stops, penalty):
    """Greedy tokens, with everything that is in the context read anew for each."""
    begin, limit = 0, model.config.max_seq_len
    for _ in range(new):
        if len(text) - begin > limit:
            begin = len(text) - limit // 2
        with torch.no_grad():
            logits = model(torch.tensor([text[begin:]]))[0, -1]
        seen = torch.tensor(sorted({*text}))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        text = [*text, int(logits.argmax())]
        if text[-1] in stops:
            break
    return text


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_tokens_are_those_of_whole_passes(cuda_graph, captured):
    model, prompts, lengths = build(SMALL), [[1, 2, 3], [4, 5, 6], [9, 9, 8]], set()
    for stops in ([], range(0, 40, 5), range(1, 40, 9)):
        found = generate(
            model, prompts, 40, temperature=0, stop_tokens=stops, repetition_penalty=1.3,
            cuda_graph=cuda_graph,
        )  # fmt: skip
        expected = [by_whole_passes(model, row, 40, stops, 1.3) for row in prompts]
        assert [row.tolist() for row in found] == expected
        lengths |= {len(row) for row in expected}
    assert len(lengths) > 3
