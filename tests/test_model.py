"""Area "model": the operators and modules of the Transformer against PyTorch's and transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cs336_registry.components.rope import rotation_tables
from cs336_registry.conformance.subject import find

from .support import device_of, normal, properties, skip_without_float64

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""float32 through several products of a hundred terms each."""


@pytest.fixture
def device(cs336_backend):
    return device_of(cs336_backend, "rmsnorm")


def assert_same(found, expected, inputs, **tolerance):
    """Equal values, and equal gradients of `inputs` under an uneven upstream gradient."""
    torch.testing.assert_close(found, expected, **tolerance)
    upstream = normal(*expected.shape, seed=99, device=expected.device, dtype=expected.dtype)
    for one, other in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def random_language_model(build, device, **changes):
    sizes = {"vocab_size": 61, "context_length": 24, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48}
    torch.manual_seed(0)
    return build(**(sizes | changes)).to(device)


# Operators


def test_linear(implementation_of, device):
    x = normal(4, 12, 64, device=device).requires_grad_()
    weight = normal(128, 64, seed=1, device=device).requires_grad_()
    assert_same(implementation_of("linear")(x, weight), F.linear(x, weight), (x, weight), **CLOSE)


def test_embedding(implementation_of, device):
    weight = normal(50, 16, device=device).requires_grad_()
    token_ids = torch.tensor([[3, 49, 3], [0, 3, 7]], device=device)
    assert_same(implementation_of("embedding")(token_ids, weight), F.embedding(token_ids, weight), (weight,))


def test_embedding_sums_its_gradient_in_one_order(implementation_of, cs336_backend, device):
    """With several threads, and so many ids that they share the work; training would not repeat itself otherwise."""
    embedding = implementation_of("embedding")
    if not find(cs336_backend, "embedding").claims.deterministic:
        pytest.skip(f"{cs336_backend} does not claim the same bits again")
    weight = normal(2048, 128, device=device).requires_grad_()
    token_ids = (normal(16, 128, seed=1, device=device) * 20).long().abs()
    upstream = normal(16, 128, 128, seed=2, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = {
            torch.autograd.grad(embedding(token_ids, weight), weight, upstream)[0].cpu().numpy().tobytes()
            for _ in range(20)
        }
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_silu(implementation_of, device):
    x = normal(5, 33, device=device, scale=4.0).requires_grad_()
    assert_same(implementation_of("silu")(x), F.silu(x), (x,))


def test_swiglu(implementation_of, device):
    gate, up = (normal(5, 33, seed=seed, device=device).requires_grad_() for seed in (0, 1))
    assert_same(implementation_of("swiglu")(gate, up), F.silu(gate) * up, (gate, up))


def test_rmsnorm(implementation_of, device):
    x = normal(4, 12, 64, device=device).requires_grad_()
    weight = normal(64, seed=1, device=device).requires_grad_()
    assert_same(implementation_of("rmsnorm")(x, weight, 1e-5), F.rms_norm(x, (64,), weight, 1e-5), (x, weight), **CLOSE)


def test_rmsnorm_of_half_precision_keeps_its_statistics_in_float32(implementation_of, device):
    x = normal(4, 64, device=device, scale=300.0).to(torch.float16)
    weight = torch.ones(64, device=device, dtype=torch.float16)
    found = implementation_of("rmsnorm")(x, weight)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), F.rms_norm(x.float(), (64,), eps=1e-5), rtol=2e-3, atol=2e-3)


def test_add_rmsnorm(implementation_of, device):
    x, residual = (normal(4, 33, seed=seed, device=device).requires_grad_() for seed in (0, 1))
    weight = normal(33, seed=2, device=device).requires_grad_()
    normed, total = implementation_of("add_rmsnorm")(x, residual, weight)
    assert_same(normed * total, F.rms_norm(x + residual, (33,), weight, 1e-5) * (x + residual), (x, residual, weight))


def test_rope_turns_complex_numbers(implementation_of, device):
    q, k = normal(2, 4, 9, 16, device=device), normal(2, 2, 9, 16, seed=1, device=device)
    cos, sin = rotation_tables(16, 40, 10000.0, device)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 39, 2, 2, 11, 8, 0, 20, 21]], device=device)
    for x, found in zip((q, k), implementation_of("rope")(q, k, cos, sin, positions), strict=True):
        frequencies = 10000.0 ** (-torch.arange(8, device=device) / 8)
        turn = torch.polar(torch.ones(2, 9, 8, device=device), positions[..., None] * frequencies)
        expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (8, 2))) * turn[:, None]).flatten(-2)
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=["2d", "3d", "4d"])
def test_attention(implementation_of, device, leading, is_causal):
    q, k, v = (normal(*leading, 33, 16, seed=seed, device=device).requires_grad_() for seed in range(3))
    found = implementation_of("attention")(q, k, v, is_causal=is_causal)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    assert_same(found, expected, (q, k, v), **CLOSE)


def test_attention_with_a_mask(implementation_of, device):
    q = normal(2, 3, 12, 16, device=device).requires_grad_()
    k, v = (normal(2, 3, 21, 16, seed=seed, device=device).requires_grad_() for seed in (1, 2))
    mask = normal(2, 1, 12, 21, seed=3, device=device) > 0
    mask[..., 0] = True
    found = implementation_of("attention")(q, k, v, mask)
    assert_same(found, F.scaled_dot_product_attention(q, k, v, mask), (q, k, v), **CLOSE)


@pytest.mark.parametrize("name", ["add_rmsnorm", "attention", "linear", "rmsnorm", "rope", "silu", "swiglu"])
def test_gradcheck(implementation_of, cs336_backend, device, name):
    implementation = implementation_of(name)
    skip_without_float64(cs336_backend, name)
    shapes = {
        "add_rmsnorm": ((3, 5), (3, 5), (5,)),
        "attention": ((1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4)),
        "linear": ((3, 5), (2, 5)),
        "rmsnorm": ((3, 5), (5,)),
        "rope": ((2, 3, 4), (3, 4)),
        "silu": ((7,),),
        "swiglu": ((2, 5), (2, 5)),
    }
    inputs = tuple(
        normal(*shape, seed=seed, device=device, dtype=torch.float64).requires_grad_()
        for seed, shape in enumerate(shapes[name])
    )
    extra = rotation_tables(4, 3, 10.0, device) if name == "rope" else ()
    options = {"is_causal": True} if name == "attention" else {}
    assert torch.autograd.gradcheck(lambda *tensors: implementation(*tensors, *extra, **options), inputs)


def test_flash_attention_in_plain_pytorch():
    from cs336_reference.flash_attention import FlashAttention2

    sizes = ((128, 128, False), (128, 128, True), (70, 41, True), (33, 95, False), (1, 1, True))
    for queries, keys, is_causal in sizes:
        q = normal(2, queries, 16, dtype=torch.float64).requires_grad_()
        k, v = (normal(2, keys, 16, seed=seed, dtype=torch.float64).requires_grad_() for seed in (1, 2))
        found = FlashAttention2.apply(q, k, v, is_causal)
        saved = [tensor.shape for tensor in found.grad_fn.saved_tensors]
        assert saved.count((2, queries)) == 1, "exactly one log-sum-exp is kept"
        assert (2, queries, keys) not in saved, "no matrix of scores is kept"
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        assert_same(found, expected, (q, k, v))


# Laws


@properties
@given(seq=st.integers(1, 12), pairs=st.integers(1, 9), shift=st.integers(0, 50), seed=st.integers(0, 1000))
def test_rope_keeps_lengths_and_sees_distances_alone(implementation_of, device, seq, pairs, shift, seed):
    rope = implementation_of("rope")
    q, k = (normal(seq, 2 * pairs, seed=seed + index, device=device) for index in (0, 1))
    tables = rotation_tables(2 * pairs, 70, 100.0, device)
    positions = torch.arange(seq, device=device)
    near, far = (rope(q, k, *tables, positions + start) for start in (0, shift))
    torch.testing.assert_close(far[0].norm(dim=-1), q.norm(dim=-1), **CLOSE)
    torch.testing.assert_close(far[0] @ far[1].T, near[0] @ near[1].T, rtol=1e-3, atol=1e-3)


@properties
@given(length=st.integers(2, 40), seed=st.integers(0, 1000), data=st.data())
def test_attention_does_not_see_the_future(implementation_of, device, length, seed, data):
    attention = implementation_of("attention")
    seen = data.draw(st.integers(1, length - 1))
    q, k, v = (normal(1, 2, length, 16, seed=seed + index, device=device) for index in range(3))
    before = attention(q, k, v, is_causal=True)
    k[..., seen:, :] += 5.0
    v[..., seen:, :] -= 50.0
    after = attention(q, k, v, is_causal=True)
    torch.testing.assert_close(after[..., :seen, :], before[..., :seen, :])
    assert (after[..., seen:, :] != before[..., seen:, :]).any()


@properties
@given(keys=st.integers(1, 40), seed=st.integers(0, 1000))
def test_attention_does_not_care_for_the_order_of_keys(implementation_of, device, keys, seed):
    attention = implementation_of("attention")
    q = normal(1, 1, 5, 16, seed=seed, device=device)
    k, v = (normal(1, 1, keys, 16, seed=seed + index, device=device) for index in (1, 2))
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(seed)).to(device)
    torch.testing.assert_close(attention(q, k[..., order, :], v[..., order, :]), attention(q, k, v), **CLOSE)


@properties
@given(d_model=st.integers(1, 80), power=st.integers(-6, 6), seed=st.integers(0, 1000))
def test_rmsnorm_does_not_care_for_scale(implementation_of, device, d_model, power, seed):
    rmsnorm = implementation_of("rmsnorm")
    x, weight = normal(3, d_model, seed=seed, device=device), normal(d_model, seed=seed + 1, device=device)
    torch.testing.assert_close(rmsnorm(x * 2.0**power, weight, 0.0), rmsnorm(x, weight, 0.0), **CLOSE)


# Modules


def test_multihead_self_attention_is_torchs(implementation_of, device):
    torch.manual_seed(0)
    ours = implementation_of("multihead_self_attention")(32, 4).to(device)
    theirs = torch.nn.MultiheadAttention(32, 4, bias=False, batch_first=True, device=device)
    with torch.no_grad():
        projections = (ours.q_proj, ours.k_proj, ours.v_proj)
        theirs.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        theirs.out_proj.weight.copy_(ours.output_proj.weight)
    x = normal(3, 13, 32, device=device).requires_grad_()
    future = torch.ones(13, 13, dtype=torch.bool, device=device).triu(1)
    expected, _ = theirs(x, x, x, attn_mask=future, need_weights=False)
    assert_same(ours(x), expected, (x,), **CLOSE)


@pytest.mark.slow  # importing transformers takes long
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.filterwarnings("ignore")  # a library's own warnings are not ours
def test_transformer_lm_is_llama(implementation_of, device, kv_heads):
    transformers = pytest.importorskip("transformers", reason="the outside oracle is in the export extra")
    ours = random_language_model(implementation_of("transformer_lm"), device, num_kv_heads=kv_heads)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=24,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    theirs = transformers.LlamaForCausalLM(config).to(device).eval()
    theirs.load_state_dict(llama_names(ours.state_dict(), d_head=8))
    token_ids = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        torch.testing.assert_close(ours(token_ids), theirs(token_ids).logits, **CLOSE)


def llama_names(state, d_head):
    """Our weights under Llama's names; Llama pairs feature i with i + d_head / 2, so rows of q and k move."""
    order = torch.cat((torch.arange(0, d_head, 2), torch.arange(1, d_head, 2)))
    words = {"output_proj": "o_proj", "attn.": "self_attn.", "ln1": "input_layernorm"}
    words |= {"ln2": "post_attention_layernorm", "ffn.w1": "mlp.gate_proj", "ffn.w2": "mlp.down_proj"}
    words |= {"ffn.w3": "mlp.up_proj", "token_embeddings": "embed_tokens", "ln_final": "norm"}
    found = {}
    for name, weight in state.items():
        if ".q_proj." in name or ".k_proj." in name:
            weight = weight.unflatten(0, (-1, d_head))[:, order.to(weight.device)].flatten(0, 1)
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        found[name if name == "lm_head.weight" else f"model.{name}"] = weight
    return found


def test_state_dict_names_are_the_courses(implementation_of, device):
    model = random_language_model(implementation_of("transformer_lm"), device)
    block = [f"attn.{name}_proj" for name in ("q", "k", "v", "output")]
    block += ["ffn.w1", "ffn.w2", "ffn.w3", "ln1", "ln2"]
    expected = {"token_embeddings.weight", "ln_final.weight", "lm_head.weight"}
    expected |= {f"layers.{layer}.{name}.weight" for layer in range(2) for name in block}
    assert set(model.state_dict()) == expected
    assert model.state_dict()["layers.1.ffn.w2.weight"].shape == (32, 48)


def test_truncated_input_has_the_same_logits(implementation_of, device):
    model = random_language_model(implementation_of("transformer_lm"), device)
    token_ids = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids[:, :12]), model(token_ids)[:, :12], **CLOSE)


def test_later_tokens_have_no_gradient_in_earlier_logits(implementation_of, device):
    model = random_language_model(implementation_of("transformer_lm"), device)
    embedded = []
    model.token_embeddings.register_forward_hook(lambda module, args, output: embedded.append(output))
    token_ids = torch.arange(24, device=device).unsqueeze(0)
    (gradient,) = torch.autograd.grad(model(token_ids)[0, 10].sum(), embedded[:1] or model(token_ids))
    assert (gradient[0, 11:] == 0).all()
    assert (gradient[0, :11].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("ablation", ["ffn=silu", "norm=none", "norm=post", "position=none", "tie_embeddings=True"])
def test_ablations_train(implementation_of, device, ablation):
    name, _, value = ablation.partition("=")
    build = implementation_of("transformer_lm")
    model = random_language_model(build, device, **{name: value if value != "True" else True})
    names = set(model.state_dict())
    assert ("layers.0.ffn.w3.weight" in names) == (ablation != "ffn=silu")
    assert ("layers.0.ln1.weight" in names) == ("ln_final.weight" in names) == (ablation != "norm=none")
    token_ids = torch.arange(24, device=device).unsqueeze(0)
    loss = F.cross_entropy(model(token_ids)[0, :-1], token_ids[0, 1:])
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
        assert F.cross_entropy(model(token_ids)[0, :-1], token_ids[0, 1:]) < loss


def test_without_positions_the_order_of_the_past_is_invisible(implementation_of, device):
    build = implementation_of("transformer_lm")
    token_ids = torch.tensor([[1, 2, 3, 4, 5]], device=device)
    swapped = torch.tensor([[2, 1, 3, 4, 5]], device=device)
    with torch.no_grad():
        blind = random_language_model(build, device, position="none", num_layers=1)
        torch.testing.assert_close(blind(token_ids)[:, -1], blind(swapped)[:, -1], **CLOSE)
        sighted = random_language_model(build, device, num_layers=1)
        assert (sighted(token_ids)[:, -1] - sighted(swapped)[:, -1]).abs().max() > 1e-4


def test_tied_embeddings_share_one_tensor(implementation_of, device):
    model = random_language_model(implementation_of("transformer_lm"), device, tie_embeddings=True)
    assert model.lm_head.weight is model.token_embeddings.weight
    assert len(list(model.parameters())) == len(model.state_dict()) - 1


@pytest.mark.parametrize("pieces", [(1,) * 9, (4, 1, 4), (9,)], ids=["one_by_one", "mixed", "at_once"])
def test_cached_generation_equals_the_cache_free_path(implementation_of, device, pieces):
    model = random_language_model(implementation_of("transformer_lm"), device, num_kv_heads=2)
    token_ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)
    cache = model.new_cache()
    with torch.no_grad():
        found = torch.cat([model(piece, cache=cache) for piece in token_ids.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(found, model(token_ids), **CLOSE)
    assert cache.length == 9


def test_a_full_cache_and_a_cache_with_gradients_are_refused(implementation_of, device):
    model = random_language_model(implementation_of("transformer_lm"), device)
    token_ids = torch.arange(20, device=device).unsqueeze(0)
    with pytest.raises(RuntimeError, match="a KV cache has no gradient"):
        model(token_ids, cache=model.new_cache())
    cache = model.new_cache()
    with torch.no_grad():
        model(token_ids, cache=cache)
        with pytest.raises(ValueError, match="a sequence of 40 tokens is longer than context_length 24"):
            model(token_ids, cache=cache)


def test_hidden_states_are_what_the_head_reads(implementation_of, device):
    model = random_language_model(implementation_of("transformer_lm"), device)
    token_ids = torch.arange(24, device=device).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model.hidden_states(token_ids) @ model.lm_head.weight.T, model(token_ids), **CLOSE)


def test_rotary_tables_stay_exact(implementation_of, device):
    build = implementation_of("transformer_lm")
    model = random_language_model(build, device, context_length=5000, num_layers=1, rope_theta=500.0)
    rope = model.to(torch.bfloat16).layers[0].attn.rope
    angles = torch.arange(5000, dtype=torch.float64)[:, None] * 500.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    assert rope.cos.dtype == rope.sin.dtype == torch.float32
    assert torch.equal(rope.cos.cpu(), angles.cos().float()) and torch.equal(rope.sin.cpu(), angles.sin().float())


def test_initialisation(implementation_of, device):
    model = random_language_model(implementation_of("transformer_lm"), device, vocab_size=2000, d_ff=512)
    for weight, deviation in (
        (model.token_embeddings.weight, 1.0),
        (model.layers[0].ffn.w1.weight, math.sqrt(2 / (32 + 512))),
        (model.lm_head.weight, math.sqrt(2 / (32 + 2000))),
    ):
        assert weight.abs().max() <= 3 * deviation
        # Cutting at three deviations leaves 0.9866 of the standard deviation; 16 384 draws know it to one percent.
        assert abs(float(weight.detach().std()) / deviation - 0.9866) < 0.03
        assert abs(float(weight.detach().mean())) < 0.03 * deviation
    assert all((norm.weight == 1).all() for norm in (model.ln_final, model.layers[0].ln1, model.layers[0].ln2))


def test_a_full_layer_cache_is_refused():
    from cs336_registry.nn import LayerCache

    cache = LayerCache(4)
    keys, values = cache.append(*(normal(1, 2, 3, 8, seed=seed) for seed in (0, 1)))
    assert keys.shape == values.shape == (1, 2, 3, 8)
    with pytest.raises(ValueError, match="the KV cache holds 4 tokens, 5 are too many"):
        cache.append(*(normal(1, 2, 2, 8, seed=seed) for seed in (0, 1)))


def test_modules_use_the_operations_they_are_given():
    from cs336_reference.linear import linear

    from cs336_registry import nn

    calls = []

    def counted(x, weight):
        calls.append(weight.shape)
        return linear(x, weight)

    module = nn.Linear(4, 3, ops={"linear": counted})
    module(torch.zeros(2, 4))
    assert calls == [(3, 4)]
    with pytest.raises(ValueError, match="ops lacks attention: add them, or leave ops out"):
        nn.MultiHeadSelfAttention(8, 2, ops={"linear": linear})
