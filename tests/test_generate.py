"""Generation with a real Transformer: greedy choices, seeds, stop tokens and the context's limit."""

from __future__ import annotations

import pytest
import torch

from cs336_registry.nn import TransformerLM

VOCAB = 29


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = TransformerLM(VOCAB, 16, 32, 2, 4, 64)
    with torch.no_grad():
        built.lm_head.weight.mul_(4)  # So that choices are clear.
    return built


@pytest.fixture
def prompt():
    return torch.tensor([[1, 2, 3], [4, 5, 6]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_greedy_tokens_are_the_most_probable_ones(implementation_of, model, prompt):
    found = implementation_of("generate")(model, prompt, 10, temperature=0.0)
    assert found.shape == (2, 13) and found.dtype == torch.int64
    assert torch.equal(found[:, :3], prompt)
    with torch.no_grad():
        expected = model(found[:, :-1])[:, 2:].argmax(-1)
    assert torch.equal(found[:, 3:], expected)


def test_beyond_the_context_the_last_tokens_count(implementation_of, model, prompt):
    found = implementation_of("generate")(model, prompt, 30, temperature=0.0)
    with torch.no_grad():
        for end in range(20, 33):
            assert torch.equal(found[:, end], model(found[:, end - 16 : end])[:, -1].argmax(-1))


def test_a_shorter_context_can_be_asked_for(implementation_of, model, prompt):
    found = implementation_of("generate")(model, prompt, 8, temperature=0.0, context_length=2)
    with torch.no_grad():
        assert torch.equal(found[:, -1], model(found[:, -3:-1])[:, -1].argmax(-1))


def test_seeds_repeat_and_backends_agree(implementation_of, model, prompt):
    from cs336_reference.generate import generate

    settings = {"temperature": 1.3, "top_k": 12, "top_p": 0.9}
    found = implementation_of("generate")(model, prompt, 20, generator=seeded(), **settings)
    assert torch.equal(found, implementation_of("generate")(model, prompt, 20, generator=seeded(), **settings))
    assert torch.equal(found, generate(model, prompt, 20, generator=seeded(), **settings))
    assert not torch.equal(found, implementation_of("generate")(model, prompt, 20, generator=seeded(1), **settings))


def test_the_global_seed_decides_without_a_generator(implementation_of, model, prompt):
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(implementation_of("generate")(model, prompt, 12))
    assert torch.equal(*found)


def test_top_k_tokens_come_from_the_top_k(implementation_of, model, prompt):
    found = implementation_of("generate")(model, prompt.repeat(50, 1), 6, top_k=3, temperature=5.0, generator=seeded())
    with torch.no_grad():
        best = model(found[:, :-1])[:, 2:].topk(3).indices
    assert (best == found[:, 3:, None]).any(-1).all()
    assert len(set(map(tuple, found.tolist()))) > 10, "a high temperature gave hardly any variety"


def test_generation_stops_at_stop_tokens(implementation_of, model, prompt):
    free = implementation_of("generate")(model, prompt, 40, generator=seeded())
    stop = int(free[0, 5])
    found = implementation_of("generate")(model, prompt, 40, generator=seeded(), stop_token_ids=[stop])
    first = free[0].tolist().index(stop, 3)
    assert found[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert set(found[0, first:].tolist()) == {stop}
    both = implementation_of("generate")(model, prompt, 40, stop_token_ids=range(VOCAB))
    assert both.shape == (2, 4), "all rows were finished after one token"


def test_no_gradient_is_recorded(implementation_of, model, prompt):
    calls = []

    def watched(tokens):
        logits = model(tokens)
        calls.append(logits.requires_grad)
        return logits

    implementation_of("generate")(watched, prompt, 2)
    assert calls == [False, False]


def test_a_diverged_model_is_named(implementation_of, prompt):
    with pytest.raises(ValueError, match="the model returned NaN logits"):
        implementation_of("generate")(lambda tokens: torch.full((*tokens.shape, 5), float("nan")), prompt, 2)
