"""Wrong generate: the contract's loop with a switch for every bug."""

from __future__ import annotations

import torch

from ...components.generate import window_of
from . import mutation


def choose(logits, temperature, top_k, top_p, generator, bugs):
    """One token a row; right without bugs."""
    if "float32" in bugs:
        logits = logits.float()
    logits, ids = logits.double().sort(dim=-1, descending="ascending" not in bugs, stable=True)
    if temperature == 0 and "temperature 0 samples" not in bugs:
        return ids[:, 0]
    if "temperature multiplies" in bugs:
        temperature = 1 / temperature
    if "temperature ignored" in bugs:
        temperature = 1.0
    if top_k is not None and "top_k one too few" in bugs:
        top_k = max(top_k - 1, 1)
    kept = logits if "top_k ignored" in bugs else logits[:, :top_k]
    probabilities = torch.softmax(kept / (temperature or 1.0), dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    if top_p is not None and "top_p ignored" not in bugs:
        inside = cumulative <= top_p if "nucleus too small" in bugs else cumulative - probabilities < top_p
        inside[:, 0] = True
        probabilities = torch.where(inside, probabilities, 0.0)
        if "nucleus too large" in bugs:
            probabilities = torch.where(inside | inside.roll(1, -1), torch.softmax(kept / temperature, -1), 0.0)
        cumulative = probabilities.cumsum(dim=-1)
    source = None if "generator ignored" in bugs else generator
    draws = torch.rand(len(logits), dtype=torch.float64, generator=source)
    if "one draw for the batch" in bugs:
        draws = draws[:1].expand(len(logits))
    aim = draws[:, None] * (1.0 if "not renormalised" in bugs else cumulative[:, -1:])
    choice = torch.minimum((cumulative <= aim).sum(dim=-1), (probabilities > 0).sum(dim=-1) - 1)
    return ids.gather(-1, choice[:, None]).squeeze(-1)


def sample(bugs, model, prompt, max_new_tokens, temperature, top_k, top_p, stop_token_ids, generator, context_length):
    window = None if "window ignored" in bugs else window_of(model, context_length)
    tokens = prompt.long()
    stops = torch.tensor(sorted(stop_token_ids), dtype=torch.int64)
    finished = torch.zeros(len(tokens), dtype=torch.bool)
    for _ in range(max_new_tokens - ("one token too few" in bugs)):
        if bool(finished.any() if "first stop ends all" in bugs else finished.all()):
            break
        given = (
            tokens if window is None else tokens[:, :window] if "oldest tokens kept" in bugs else tokens[:, -window:]
        )
        logits = model(given)
        logits = logits[:, 0] if "logits of the first place" in bugs else logits[:, -1]
        chosen = choose(logits, temperature, top_k, top_p, generator, bugs)
        if "stopped rows go on" not in bugs:
            chosen = torch.where(finished, tokens[:, -1], chosen)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        if "stop tokens ignored" not in bugs:
            finished = finished | torch.isin(chosen, stops)
    return tokens[:, prompt.shape[1] :] if "prompt dropped" in bugs else tokens


for _name, _switch, _bug in (
    ("temperature_multiplies", "temperature multiplies", "logits are multiplied by the temperature"),
    ("temperature_ignored", "temperature ignored", "the temperature is ignored"),
    ("temperature_zero_samples", "temperature 0 samples", "temperature 0 samples instead of taking the best"),
    ("top_k_one_too_few", "top_k one too few", "top_k keeps one candidate too few"),
    ("top_k_ignored", "top_k ignored", "top_k is ignored"),
    ("top_p_ignored", "top_p ignored", "top_p is ignored"),
    ("nucleus_too_small", "nucleus too small", "the token that crosses top_p is left out"),
    ("nucleus_too_large", "nucleus too large", "one token beyond top_p is kept"),
    (
        "nucleus_not_renormalised",
        "not renormalised",
        "what is kept is not renormalised, and the last one takes the rest",
    ),
    ("seed_ignored", "generator ignored", "the generator is ignored"),
    ("one_draw_for_the_batch", "one draw for the batch", "one random number serves all rows"),
    ("window_ignored", "window ignored", "the model is given more than its context"),
    ("oldest_tokens_kept", "oldest tokens kept", "beyond the context, the oldest tokens are kept"),
    ("first_stop_ends_all", "first stop ends all", "the first row that stops ends all rows"),
    ("stopped_rows_go_on", "stopped rows go on", "a row goes on after its stop token"),
    ("stop_tokens_ignored", "stop tokens ignored", "stop tokens are ignored"),
    ("prompt_dropped", "prompt dropped", "the prompt is not returned"),
    ("one_token_too_few", "one token too few", "one token too few is made"),
    ("logits_of_the_first_place", "logits of the first place", "the first position's logits are sampled from"),
):

    def _make(textbook, bugs=frozenset({_switch})):
        def generate(
            model,
            prompt,
            max_new_tokens,
            *,
            temperature=1.0,
            top_k=None,
            top_p=None,
            stop_token_ids=(),
            generator=None,
            context_length=None,
        ):
            with torch.no_grad():
                limits = (temperature, top_k, top_p, stop_token_ids, generator, context_length)
                return sample(bugs, model, prompt, max_new_tokens, *limits)

        return generate

    _make.__name__ = _name
    # A model that is given more than its context may refuse it.
    mutation("generate", _bug, raises=_switch == "window ignored")(_make)
