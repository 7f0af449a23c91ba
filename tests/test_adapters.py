"""The adapters: names and parameters are the course's, and each does over the active backend what the course asks."""

from __future__ import annotations

import inspect
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cs336_registry as registry
from cs336_registry import adapters
from cs336_registry.errors import UnavailableError

from .support import normal

PARAMETERS = {
    "run_linear": "d_in d_out weights in_features",
    "run_embedding": "vocab_size d_model weights token_ids",
    "run_swiglu": "d_model d_ff w1_weight w2_weight w3_weight in_features",
    "run_silu": "in_features",
    "run_rmsnorm": "d_model eps weights in_features",
    "run_softmax": "in_features dim",
    "run_cross_entropy": "inputs targets",
    "run_scaled_dot_product_attention": "Q K V mask=None",
    "run_rope": "d_k theta max_seq_len in_query_or_key token_positions",
    "run_multihead_self_attention": "d_model num_heads "
    "q_proj_weight k_proj_weight v_proj_weight o_proj_weight in_features",
    "run_multihead_self_attention_with_rope": "d_model num_heads max_seq_len theta "
    "q_proj_weight k_proj_weight v_proj_weight o_proj_weight in_features token_positions=None",
    "run_transformer_block": "d_model num_heads d_ff max_seq_len theta weights in_features",
    "run_transformer_lm": "vocab_size context_length d_model num_layers num_heads d_ff rope_theta weights in_indices",
    "run_get_batch": "dataset batch_size context_length device",
    "run_gradient_clipping": "parameters max_l2_norm",
    "get_adamw_cls": "",
    "run_get_lr_cosine_schedule": "it max_learning_rate min_learning_rate warmup_iters cosine_cycle_iters",
    "run_save_checkpoint": "model optimizer iteration out",
    "run_load_checkpoint": "src model optimizer",
    "get_tokenizer": "vocab merges special_tokens=None",
    "run_train_bpe": "input_path vocab_size special_tokens **kwargs",
    "get_flashattention_autograd_function_pytorch": "",
    "get_flashattention_autograd_function_triton": "",
    "get_ddp": "module",
    "ddp_on_after_backward": "ddp_model optimizer",
    "get_fsdp": "module compute_dtype=None",
    "fsdp_on_after_backward": "fsdp_model optimizer",
    "fsdp_gather_full_params": "fsdp_model",
    "get_sharded_optimizer": "params optimizer_cls **kwargs",
}


@pytest.fixture(autouse=True)
def chosen(request):
    """Component tests run over the backend under test; the adapters resolve when they are called."""
    if "cs336_backend" not in request.fixturenames:
        yield
        return
    with registry.use(request.getfixturevalue("cs336_backend") + "!"):
        yield


@pytest.fixture
def device(cs336_backend):
    from .support import device_of

    return device_of(cs336_backend, "attention")


def test_star_import_gives_exactly_the_names_of_the_course():
    namespace = {}
    exec("from cs336_registry.adapters import *", namespace)
    assert sorted(set(namespace) - {"__builtins__"}) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameters_are_those_of_the_course(name):
    found = []
    for parameter in inspect.signature(getattr(adapters, name)).parameters.values():
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        found.append(("**" if parameter.kind is parameter.VAR_KEYWORD else "") + parameter.name + default)
    assert " ".join(found) == PARAMETERS[name]


def test_every_adapter_of_a_contract_exists():
    for name in registry.components():
        adapter = registry.contract(name).adapter
        assert adapter in {"", *PARAMETERS}, f"{name} names the adapter {adapter}"


def test_linear_and_embedding(device):
    weights, x = normal(5, 7, device=device), normal(2, 3, 7, seed=1, device=device)
    torch.testing.assert_close(adapters.run_linear(7, 5, weights, x), F.linear(x, weights))
    ids = torch.tensor([[0, 4], [4, 2]], device=device)
    torch.testing.assert_close(adapters.run_embedding(5, 7, weights, ids), weights[ids])
    with pytest.raises(ValueError, match=r"weights has shape \(5, 7\), the sizes given make it \(7, 5\)"):
        adapters.run_linear(5, 7, weights, x)


def test_small_functions(device):
    x = normal(4, 9, device=device)
    torch.testing.assert_close(adapters.run_silu(x), F.silu(x))
    torch.testing.assert_close(adapters.run_softmax(x, 0), F.softmax(x, 0))
    torch.testing.assert_close(adapters.run_softmax(x + 100, -1), F.softmax(x, -1), rtol=1e-4, atol=1e-6)
    gain = normal(9, seed=1, device=device)
    torch.testing.assert_close(adapters.run_rmsnorm(9, 1e-5, gain, x), F.rms_norm(x, (9,), gain, 1e-5))
    targets = torch.tensor([1, 0, 8, 3], device=device)
    torch.testing.assert_close(adapters.run_cross_entropy(1000 * x, targets), F.cross_entropy(1000 * x, targets))


def test_swiglu(device):
    x = normal(2, 3, 8, device=device)
    w1, w2, w3 = (normal(*shape, seed=s, device=device) for s, shape in enumerate(((20, 8), (8, 20), (20, 8)), 1))
    expected = F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
    torch.testing.assert_close(adapters.run_swiglu(8, 20, w1, w2, w3, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("leading", [(3,), (2, 4), ()], ids=["batch", "batch_and_heads", "none"])
def test_attention_with_any_leading_dimensions(device, leading):
    q, k, v = (normal(*leading, length, 16, seed=length, device=device) for length in (6, 10, 10))
    mask = normal(*leading, 6, 10, seed=3, device=device) > -0.5
    mask[..., 0] = True  # Rows that see nothing are not the course's business.
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(adapters.run_scaled_dot_product_attention(q, k, v, mask), expected, rtol=1e-4, atol=1e-5)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(adapters.run_scaled_dot_product_attention(q, k, v), expected, rtol=1e-4, atol=1e-5)


def rotated(x, theta, positions):
    """Pairs of neighbours as complex numbers, turned by position · theta^(-2i/d)."""
    d = x.shape[-1]
    angles = positions[..., None].double() * theta ** (-torch.arange(0, d, 2, device=x.device).double() / d)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).to(x.dtype)


def test_rope_turns_pairs_of_neighbours(device):
    x, positions = normal(2, 5, 16, device=device), torch.arange(5, device=device)
    found = adapters.run_rope(16, 10000.0, 12, x, positions)
    torch.testing.assert_close(found, rotated(x, 10000.0, positions), rtol=1e-4, atol=1e-5)
    later = torch.tensor([[0, 3, 4, 7, 11], [5, 4, 3, 2, 1]], device=device)
    found = adapters.run_rope(16, 10000.0, 12, x, later)
    torch.testing.assert_close(found, rotated(x, 10000.0, later), rtol=1e-4, atol=1e-5)


def attended(x, weights, num_heads, theta=None, positions=None):
    """Multi-head attention written out with PyTorch's own attention."""
    q, k, v = (F.linear(x, weights[f"{name}_proj.weight"]).unflatten(-1, (num_heads, -1)) for name in "qkv")
    q, k, v = (part.transpose(-3, -2) for part in (q, k, v))
    if theta is not None:
        positions = torch.arange(x.shape[-2], device=x.device) if positions is None else positions
        positions = positions if positions.ndim == 1 else positions.unsqueeze(-2)
        q, k = rotated(q, theta, positions), rotated(k, theta, positions)
    found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(found.transpose(-3, -2).flatten(-2), weights["output_proj.weight"])


def attention_weights(d_model, device, seed=0):
    names = ("q_proj", "k_proj", "v_proj", "output_proj")
    scale = d_model**-0.5
    return {
        f"{name}.weight": normal(d_model, d_model, seed=seed + n, device=device, scale=scale)
        for n, name in enumerate(names)
    }


def test_multihead_self_attention(device):
    x, weights = normal(2, 6, 64, device=device), attention_weights(64, device, seed=1)
    found = adapters.run_multihead_self_attention(64, 4, *weights.values(), x)
    torch.testing.assert_close(found, attended(x, weights, 4), rtol=1e-4, atol=1e-4)
    for positions in (None, torch.arange(6, device=device), torch.tensor([[0, 2, 4, 6, 8, 10]], device=device)):
        found = adapters.run_multihead_self_attention_with_rope(64, 4, 12, 1e4, *weights.values(), x, positions)
        torch.testing.assert_close(found, attended(x, weights, 4, 1e4, positions), rtol=1e-4, atol=1e-4)


def block_weights(d_model, d_ff, device, seed=0):
    shapes = {"ffn.w1.weight": (d_ff, d_model), "ffn.w2.weight": (d_model, d_ff), "ffn.w3.weight": (d_ff, d_model)}
    found = {f"attn.{name}": tensor for name, tensor in attention_weights(d_model, device, seed).items()}
    for n, (name, shape) in enumerate(shapes.items()):
        found[name] = normal(*shape, seed=seed + n + 10, device=device, scale=d_model**-0.5)
    return found | {f"ln{n}.weight": normal(d_model, seed=seed + n + 20, device=device) for n in (1, 2)}


def block(x, weights, num_heads, theta):
    attention = {name.removeprefix("attn."): tensor for name, tensor in weights.items()}
    d_model = x.shape[-1]
    x = x + attended(F.rms_norm(x, (d_model,), weights["ln1.weight"], 1e-5), attention, num_heads, theta)
    normed = F.rms_norm(x, (d_model,), weights["ln2.weight"], 1e-5)
    gate, up = F.linear(normed, weights["ffn.w1.weight"]), F.linear(normed, weights["ffn.w3.weight"])
    return x + F.linear(F.silu(gate) * up, weights["ffn.w2.weight"])


def test_transformer_block(device):
    x, weights = normal(2, 6, 64, device=device), block_weights(64, 128, device)
    found = adapters.run_transformer_block(64, 4, 128, 16, 1e4, weights, x)
    torch.testing.assert_close(found, block(x, weights, 4, 1e4), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"weights lack ln1.weight"):
        adapters.run_transformer_block(64, 4, 128, 16, 1e4, {n: w for n, w in weights.items() if n != "ln1.weight"}, x)


@pytest.mark.parametrize("length", [16, 8], ids=["full_context", "truncated"])
def test_transformer_lm(device, length):
    weights = {
        "token_embeddings.weight": normal(50, 64, seed=1, device=device),
        "ln_final.weight": normal(64, device=device),
    }
    for n in range(2):
        weights |= {f"layers.{n}.{k}": w for k, w in block_weights(64, 128, device, seed=100 * n).items()}
    weights["lm_head.weight"] = normal(50, 64, seed=2, device=device, scale=0.1)
    ids = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)[:, :length]
    x = weights["token_embeddings.weight"][ids]
    for n in range(2):
        layer = {name.removeprefix(f"layers.{n}."): w for name, w in weights.items() if name.startswith(f"layers.{n}.")}
        x = block(x, layer, 4, 1e4)
    expected = F.linear(F.rms_norm(x, (64,), weights["ln_final.weight"], 1e-5), weights["lm_head.weight"])
    before = {name: tensor.clone() for name, tensor in weights.items()}
    found = adapters.run_transformer_lm(50, 16, 64, 2, 4, 128, 1e4, weights, ids)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items()), "the weights were changed"


def test_get_batch(cs336_backend):
    inputs, targets = adapters.run_get_batch(np.arange(100), 32, 7, "cpu")
    assert inputs.shape == targets.shape == (32, 7) and torch.equal(inputs + 1, targets)
    with pytest.raises((RuntimeError, AssertionError)):
        adapters.run_get_batch(np.arange(100), 32, 7, "cuda:99")


def test_gradient_clipping(cs336_backend):
    found = [torch.nn.Parameter(normal(5, 5, seed=n)) for n in range(3)]
    expected = [torch.nn.Parameter(parameter.detach().clone()) for parameter in found]
    for n in range(2):
        found[n].grad, expected[n].grad = normal(5, 5, seed=n + 10), normal(5, 5, seed=n + 10)
    adapters.run_gradient_clipping(found, 0.01)
    torch.nn.utils.clip_grad_norm_(expected, 0.01)
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_adamw_schedule_and_checkpoints(cs336_backend, tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = adapters.get_adamw_cls()(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert adapters.run_get_lr_cosine_schedule(14, 1.0, 0.1, 7, 21) == pytest.approx(0.55)
    for out in (tmp_path / "checkpoint.pt", io.BytesIO()):
        adapters.run_save_checkpoint(model, optimizer, 5, out)
        if isinstance(out, io.BytesIO):
            out.seek(0)
        other = torch.nn.Linear(3, 2)
        other_optimizer = adapters.get_adamw_cls()(other.parameters())
        assert adapters.run_load_checkpoint(out, other, other_optimizer) == 5
        assert torch.equal(other.weight, model.weight)
        assert other_optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_bpe_and_tokenizer(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("low low low low low lower lower widest widest widest newest newest newest newest newest newest")
    vocab, merges = adapters.run_train_bpe(path, 263, ["<|endoftext|>"])
    assert (
        merges == [(b"s", b"t"), (b"e", b"st"), (b"o", b"w"), (b"l", b"ow"), (b"w", b"est"), (b"n", b"e")]
        or len(merges) == 6
    )
    assert len(vocab) == 263 and vocab[0] == b"<|endoftext|>"
    tokenizer = adapters.get_tokenizer(vocab, merges, ["<|endoftext|>"])
    text = "newest<|endoftext|>lower ü"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|endoftext|>") == [0]


def check_flash_attention(function, device):
    for is_causal in (False, True):
        q, k, v = (normal(2, 64, 32, seed=seed, device=device).requires_grad_() for seed in range(3))
        found = function.apply(q, k, v, is_causal)
        log_sum_exps = [t for t in found.grad_fn.saved_tensors if t.shape == (2, 64)]
        assert len(log_sum_exps) == 1, "one log-sum-exp for each query is kept for backward"
        scores = (q @ k.mT) / math.sqrt(32)
        if is_causal:
            scores = scores.masked_fill(torch.ones(64, 64, device=device).triu(1).bool(), float("-inf"))
        torch.testing.assert_close(log_sum_exps[0], scores.logsumexp(-1), rtol=1e-2, atol=1e-2)
        expected = scores.softmax(-1) @ v
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        upstream = normal(2, 64, 32, seed=9, device=device)
        gradients = (torch.autograd.grad(result, (q, k, v), upstream) for result in (found, expected))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_flash_attention_in_pytorch():
    check_flash_attention(adapters.get_flashattention_autograd_function_pytorch(), "cpu")


def test_flash_attention_in_triton_or_a_clear_error():
    try:
        function = adapters.get_flashattention_autograd_function_triton()
    except UnavailableError as error:
        assert "triton" in str(error)
        return
    check_flash_attention(function, "cuda" if torch.cuda.is_available() else "cpu")
