"""Sampling of new tokens from a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..arguments import ArgumentMaker
from ..component import Arguments, Case, Component, ErrorCase, Law, Workload

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor


def generate(
    model: Callable[[Int[Tensor, "batch seq"]], Float[Tensor, "batch seq vocab"]],
    prompt: Int[Tensor, "batch seq"],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token_ids: Iterable[int] = (),
    generator: torch.Generator | None = None,
    context_length: int | None = None,
) -> Int[Tensor, "batch total"]:
    """Continue each row of `prompt` by up to `max_new_tokens` tokens drawn from softmax(logits / temperature).

    temperature: 0 takes the most probable token (the lowest id of equals) and draws nothing. top_k: only the k most
    probable tokens. top_p: of those, only the smallest set of most probable tokens whose share is at least top_p.
    stop_token_ids: a row that made one of them is finished and repeats it; when all rows are finished the result ends.
    generator: the source of randomness; None is the global one of the prompt's device. context_length: how many of the
    last tokens the model is given; None takes `model.context_length` where there is one, else all.
    Probabilities are float64. Each step draws one float64 uniform number per row, `torch.rand(batch)` on the
    generator's device, and takes the first token, in order of falling probability (equal ones by id), whose cumulative
    share exceeds it: every backend makes the same tokens of the same seed. Returns int64 (batch, seq + new), prompt
    first. Raises ValueError for an empty prompt, negative counts or temperature, top_k < 1, top_p outside (0, 1], and
    logits that are NaN; TypeError for a prompt that is not integers.
    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", https://arxiv.org/abs/1904.09751.
    """
    raise NotImplementedError


def check(
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    context_length: int | None,
) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    from ..checks import require_integer

    require_integer("generate", prompt=prompt)
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(
            f"generate: prompt has shape {tuple(prompt.shape)}: it must be (batch, tokens) with at least one token "
            f"(begin with the end-of-text token where there is no text)"
        )
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}: it must not be negative")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature is {temperature}: it must be 0 (greedy) or a positive number")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k is {top_k}: it must be at least 1, or None to keep all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p is {top_p}: it must be in (0, 1], or None to keep all tokens")
    if context_length is not None and context_length < 1:
        raise ValueError(f"generate: context_length is {context_length}: the model must see at least one token")


def window_of(model: Any, context_length: int | None) -> int | None:
    """How many tokens the model is given at most; None where there is no limit."""
    return getattr(model, "context_length", None) if context_length is None else context_length


def check_logits(logits: Tensor, tokens: Tensor) -> None:
    """Refuse what a model returned where no token can be chosen from it."""
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"generate: the model returned shape {tuple(logits.shape)} for tokens of shape {tuple(tokens.shape)}: it "
            f"must return logits of shape (batch, tokens, vocab)"
        )
    if bool(logits[:, -1].isnan().any()):
        raise ValueError(
            "generate: the model returned NaN logits: look for a diverged training run or a bad checkpoint"
        )


def example_model(make: ArgumentMaker, vocab: int, limit: int | None = None) -> Callable[[Tensor], Tensor]:
    """A model of all earlier tokens whose logits are exact in float32, so that equal ones stay equal everywhere."""
    table = make.integers(vocab, vocab, low=-24, high=25)

    def model(tokens: Tensor) -> Tensor:
        assert limit is None or tokens.shape[1] <= limit, f"the model was given {tokens.shape[1]} tokens"
        return (table[tokens] + table[tokens].cumsum(dim=1)).float() / 16

    return model


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    import torch

    sizes = case.sizes
    vocab = sizes.get("vocab", 23)
    model = example_model(make, vocab, sizes.get("context_length"))
    names = ("temperature", "top_k", "top_p", "stop_token_ids", "context_length")
    return {
        "model": model,
        "prompt": make.integers(sizes.get("batch", 3), sizes.get("prompt", 4), high=vocab),
        "max_new_tokens": sizes.get("new", 24),
        "generator": torch.Generator().manual_seed(make.seed + 1),
        **{name: sizes[name] for name in names if name in sizes},
    }


def oracle(
    model: Any,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token_ids: Iterable[int] = (),
    generator: torch.Generator | None = None,
    context_length: int | None = None,
) -> Tensor:
    """Row by row in plain Python numbers."""
    import math

    import torch

    rows = [list(map(int, row)) for row in prompt]
    stops = set(stop_token_ids)
    finished: dict[int, int] = {}
    for _ in range(max_new_tokens):
        if len(finished) == len(rows):
            break
        draws = [0.0] * len(rows)
        if temperature > 0:
            draws = torch.rand(len(rows), dtype=torch.float64, generator=generator).tolist()
        given = torch.tensor(rows)[:, -(context_length or len(rows[0])) :]
        for index, logits in enumerate(model(given)[:, -1].tolist()):
            order = sorted(range(len(logits)), key=lambda token, logits=logits: (-logits[token], token))
            order = order[: 1 if temperature == 0 else top_k]
            weights = [math.exp((logits[token] - logits[order[0]]) / (temperature or 1.0)) for token in order]
            kept = 1
            while kept < len(order) and math.fsum(weights[:kept]) < (top_p or 1.0) * math.fsum(weights):
                kept += 1
            aim = draws[index] * math.fsum(weights[:kept])
            choice = next((n for n in range(kept) if math.fsum(weights[: n + 1]) > aim), kept - 1)
            token = finished.get(index, order[choice])
            rows[index].append(token)
            if token in stops:
                finished[index] = token
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1) if rows else prompt.long()


def _run(generate, make: ArgumentMaker, seed: int = 5, **settings: Any) -> Tensor:
    import torch

    make = ArgumentMaker(make.seed, folder=make.folder)
    model = example_model(make, 23)
    prompt = make.integers(4, 3, high=23)
    return generate(model, prompt, 30, generator=torch.Generator().manual_seed(seed), **settings)


def a_single_candidate_is_greedy(generate, make: ArgumentMaker) -> None:
    import torch

    greedy = _run(generate, make, temperature=0.0)
    assert torch.equal(_run(generate, make, top_k=1), greedy), "top_k=1 differs from greedy"
    assert torch.equal(_run(generate, make, top_p=1e-9), greedy), "a tiny top_p differs from greedy"


def seeds_decide(generate, make: ArgumentMaker) -> None:
    import torch

    once = _run(generate, make)
    assert torch.equal(_run(generate, make), once), "the same seed gave other tokens"
    assert not torch.equal(_run(generate, make, seed=6), once), "another seed gave the same tokens"
    before = torch.random.get_rng_state()
    _run(generate, make)
    assert torch.equal(torch.random.get_rng_state(), before), "a generator was given and the global one was used"


def wide_limits_change_nothing(generate, make: ArgumentMaker) -> None:
    import torch

    once = _run(generate, make)
    assert torch.equal(_run(generate, make, top_k=10**6), once), "top_k beyond the vocabulary changed the tokens"
    assert torch.equal(_run(generate, make, top_p=1.0), once), "top_p=1 changed the tokens"


def stopped_rows_stay_stopped(generate, make: ArgumentMaker) -> None:
    free = _run(generate, make)
    stop = int(free[0, 8])
    stopped = _run(generate, make, stop_token_ids=[stop])
    assert stopped[:, :3].equal(free[:, :3]), "the prompt was changed"
    for row, reference in zip(stopped.tolist(), free.tolist(), strict=True):
        end = reference.index(stop, 3) if stop in reference[3:] else len(reference)
        assert row[: end + 1] == reference[: len(row)][: end + 1], "tokens before the stop differ from a free run"
        assert all(token == stop for token in row[end:]), "a finished row went on"


def frequencies_are_probabilities(generate, make: ArgumentMaker) -> None:
    """20 000 draws against softmax: the statistic's standard deviation is about 1/√draws."""
    import torch

    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    draws = 20_000
    found = generate(
        lambda tokens: logits.expand(*tokens.shape, 5),
        torch.zeros(draws, 1, dtype=torch.int64),
        1,
        temperature=2.0,
        generator=torch.Generator().manual_seed(make.seed),
    )
    frequencies = found[:, 1].bincount(minlength=5) / draws
    distance = float((frequencies - (logits / 2).softmax(0)).abs().max())
    assert distance < 5 * 0.5 / draws**0.5, f"a token's frequency is off by {distance:.4f}"


def the_nucleus_is_kept(generate, make: ArgumentMaker) -> None:
    import torch

    probabilities = torch.tensor([0.125, 0.5, 0.25, 0.125], dtype=torch.float64)
    for top_p, expected in ((0.5, {1}), (0.51, {1, 2}), (0.75, {1, 2}), (0.8, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        found = generate(
            lambda tokens: probabilities.log().expand(*tokens.shape, 4),
            torch.zeros(400, 1, dtype=torch.int64),
            1,
            # Half a rounding below the border, so that the border itself is not what is tested.
            top_p=top_p - 1e-9 if top_p < 1 else top_p,
            generator=torch.Generator().manual_seed(make.seed),
        )
        assert set(found[:, 1].tolist()) == expected, f"top_p={top_p} drew {set(found[:, 1].tolist())}, not {expected}"


def _bad(**changes: Any) -> Callable[[ArgumentMaker], Arguments]:
    return lambda make: {**arguments(Case(id=""), make), **changes}


def _bad_prompt(shape: tuple[int, ...], floating: bool = False) -> Callable[[ArgumentMaker], Arguments]:
    def build(make: ArgumentMaker) -> Arguments:
        prompt = make.integers(*shape, high=5)
        return {**arguments(Case(id=""), make), "prompt": prompt.float() if floating else prompt}

    return build


contract = Component(
    signature=generate,
    kind="algorithm",
    summary="new tokens from a language model: greedy, temperature, top-k, top-p",
    formula="token ~ softmax(logits / temperature) within top_k, then top_p",
    paper="https://arxiv.org/abs/1904.09751",
    arguments=arguments,
    oracle=oracle,
    exact=True,
    mutates=("generator",),
    cases=(
        Case(id="greedy", sizes={"temperature": 0.0}),
        Case(id="sampled"),
        Case(id="cold", sizes={"temperature": 0.3}),
        Case(id="hot", sizes={"temperature": 5.0}),
        Case(id="top_k", sizes={"top_k": 5}),
        Case(id="top_p", sizes={"top_p": 0.8}),
        Case(id="top_k_and_top_p", sizes={"top_k": 7, "top_p": 0.6, "temperature": 1.5}),
        Case(id="top_k_beyond_vocab", sizes={"top_k": 1000}),
        Case(id="stop_tokens", sizes={"stop_token_ids": (3, 7, 11), "new": 40}),
        Case(id="all_stop_at_once", sizes={"stop_token_ids": tuple(range(23))}),
        Case(id="short_context", sizes={"context_length": 3, "prompt": 6}),
        Case(id="nothing_new", sizes={"new": 0}),
        Case(id="one_row_one_token", sizes={"batch": 1, "prompt": 1, "vocab": 2, "new": 50}),
        Case(id="no_rows", sizes={"batch": 0, "new": 2}),
    ),
    error_cases=(
        ErrorCase(id="temperature", arguments=_bad(temperature=-1.0), match="temperature is -1.0"),
        ErrorCase(id="top_k", arguments=_bad(top_k=0), match="top_k is 0: it must be at least 1"),
        ErrorCase(id="top_p_zero", arguments=_bad(top_p=0.0), match=r"top_p is 0.0: it must be in \(0, 1\]"),
        ErrorCase(id="top_p_large", arguments=_bad(top_p=1.5), match="top_p is 1.5"),
        ErrorCase(id="negative_count", arguments=_bad(max_new_tokens=-1), match="max_new_tokens is -1"),
        ErrorCase(id="context_length", arguments=_bad(context_length=0), match="context_length is 0"),
        ErrorCase(id="empty_prompt", arguments=_bad_prompt((2, 0)), match=r"prompt has shape \(2, 0\)"),
        ErrorCase(id="flat_prompt", arguments=_bad_prompt((4,)), match=r"prompt has shape \(4,\)"),
        ErrorCase(
            id="floating_prompt",
            arguments=_bad_prompt((2, 3), floating=True),
            error=TypeError,
            match="prompt has dtype torch.float32",
        ),
        ErrorCase(
            id="nan_logits",
            arguments=_bad(model=lambda tokens: tokens.float().unsqueeze(-1).expand(-1, -1, 5) / 0 * 0),
            match="the model returned NaN logits",
        ),
        ErrorCase(
            id="logits_shape",
            arguments=_bad(model=lambda tokens: tokens.float()),
            match=r"the model returned shape \(3, 4\) for tokens of shape \(3, 4\)",
        ),
    ),
    laws=(
        Law(id="greedy", statement="one candidate is the greedy choice", check=a_single_candidate_is_greedy),
        Law(id="seed", statement="the same seed gives the same tokens, another one others", check=seeds_decide),
        Law(id="wide_limits", statement="limits that cut nothing change nothing", check=wide_limits_change_nothing),
        Law(id="stop", statement="a finished row repeats its stop token", check=stopped_rows_stay_stopped),
        Law(id="frequencies", statement="tokens come as often as softmax says", check=frequencies_are_probabilities),
        Law(id="nucleus", statement="top_p keeps the smallest sufficient set", check=the_nucleus_is_kept),
    ),
    workloads=tuple(
        Workload(id=f"{batch}x{new}x{vocab}", sizes={"batch": batch, "new": new, "vocab": vocab, "top_p": 0.9})
        for batch, new, vocab in ((1, 32, 1000), (16, 64, 5000))
    ),
)
