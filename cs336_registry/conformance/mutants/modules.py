"""Wrong multihead_self_attention, transformer_block and transformer_lm: the core's own modules, spoilt in one place."""

from __future__ import annotations

import torch

from ... import nn, registry
from . import mutation

PARTS = ("embedding", "linear", "rmsnorm", "add_rmsnorm", "silu", "swiglu", "rope", "attention")


def built(module, **changed):
    """Builds `module` over the reference's operations, with those in `changed` made from the right ones."""
    right = registry.operations(PARTS, backend="reference!")
    ops = {**right, **{name: change(right[name]) for name, change in changed.items()}}

    def build(*sizes, **options):
        return module(*sizes, **{"ops": ops} | options)

    return build


def _attention(name, bug, module=nn.MultiHeadSelfAttention, component="multihead_self_attention", **changed):
    def make(textbook):
        return built(module, **changed)

    make.__name__ = name
    mutation(component, bug)(make)


def _block(name, bug, module=nn.TransformerBlock, **changed):
    _attention(name, bug, module, "transformer_block", **changed)


def _model(name, bug, module=nn.TransformerLM, **changed):
    _attention(name, bug, module, "transformer_lm", **changed)


class HeadsInterleaved(nn.MultiHeadSelfAttention):
    def _split(self, x, heads):
        return x.unflatten(-1, (self.d_head, heads)).movedim(-1, -3)


class PositionsOfAttentionIgnored(nn.MultiHeadSelfAttention):
    def forward(self, x, token_positions=None, cache=None):
        return super().forward(x, None, cache)


class OutputNotProjected(nn.MultiHeadSelfAttention):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.output_proj.linear = lambda x, weight: x + 0 * weight.sum()


class RotatedBeforeTheSplit(nn.MultiHeadSelfAttention):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        if self.rope is not None and self.num_heads > 1:
            self.rope = nn.RotaryEmbedding(
                self.rope.theta * 2, self.d_head, self.rope.max_seq_len, ops={"rope": self.rope.rope}
            )


_attention(
    "heads_see_the_future", "attention is not causal", attention=lambda right: lambda q, k, v, **o: right(q, k, v)
)
_attention("heads_interleaved", "the heads are the last dimension of the projection, not the first", HeadsInterleaved)
_attention("positions_of_attention_ignored", "token_positions are ignored", PositionsOfAttentionIgnored)
_attention("output_not_projected", "the output projection is left out", OutputNotProjected)
_attention("theta_doubled", "rope_theta is twice what is asked", RotatedBeforeTheSplit)
_attention(
    "values_rotated_instead_of_keys",
    "the keys are not rotated",
    rope=lambda right: lambda q, k, *tables: (right(q, None, *tables)[0], k),
)
_attention(
    "scale_of_the_whole_width",
    "scores are scaled by the root of d_model instead of the head's width",
    attention=lambda right: lambda q, k, v, **o: right(q, k, v, scale=(q.shape[-1] * q.shape[-3]) ** -0.5, **o),
)


class ResidualMissing(nn.TransformerBlock):
    def forward(self, x, token_positions=None, cache=None):
        if self.norm != "rms":
            return super().forward(x, token_positions, cache)
        attended = self.attn(self.ln1(x), token_positions, cache) + x
        return self.ffn(self.ln2(attended))


class NormsSwapped(nn.TransformerBlock):
    def forward(self, x, token_positions=None, cache=None):
        if self.norm == "none":
            return super().forward(x, token_positions, cache)
        self.ln1, self.ln2 = self.ln2, self.ln1
        try:
            return super().forward(x, token_positions, cache)
        finally:
            self.ln1, self.ln2 = self.ln2, self.ln1


class AlwaysPostNorm(nn.TransformerBlock):
    def forward(self, x, token_positions=None, cache=None):
        self.norm = "post" if self.norm == "rms" else self.norm
        return super().forward(x, token_positions, cache)


class ParallelSublayers(nn.TransformerBlock):
    def forward(self, x, token_positions=None, cache=None):
        if self.norm != "rms":
            return super().forward(x, token_positions, cache)
        return x + self.attn(self.ln1(x), token_positions, cache) + self.ffn(self.ln2(x))


class EpsOfNormsIgnored(nn.TransformerBlock):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options | {"norm_eps": 1e-5})


_block("residual_missing", "nothing is added to the feed-forward network's result", ResidualMissing)
_block("norms_swapped", "the two norms are swapped", NormsSwapped)
_block("always_post_norm", "the norms follow the sublayers instead of leading them", AlwaysPostNorm)
_block("parallel_sublayers", "attention and feed-forward read the same input, as in GPT-J", ParallelSublayers)
_block("eps_of_norms_ignored", "norm_eps is ignored", EpsOfNormsIgnored)
_block("gate_and_value_swapped", "w1 and w3 are swapped", swiglu=lambda right: lambda gate, up: right(up, gate))
_block("block_sees_the_future", "attention is not causal", attention=lambda right: lambda q, k, v, **o: right(q, k, v))


class FinalNormMissing(nn.TransformerLM):
    def hidden_states(self, token_ids, token_positions=None, cache=None):
        x = self.token_embeddings(token_ids)
        for layer in self.layers:
            x = layer(x, token_positions)
        return x


class LayersReversed(nn.TransformerLM):
    def hidden_states(self, token_ids, token_positions=None, cache=None):
        x = self.token_embeddings(token_ids)
        for layer in reversed(self.layers):
            x = layer(x, token_positions)
        return x if self.ln_final is None else self.ln_final(x)


class LastLayerSkipped(nn.TransformerLM):
    def hidden_states(self, token_ids, token_positions=None, cache=None):
        x = self.token_embeddings(token_ids)
        for layer in self.layers[: max(len(self.layers) - 1, 1)]:
            x = layer(x, token_positions)
        return x if self.ln_final is None else self.ln_final(x)


class AlwaysTied(nn.TransformerLM):
    def forward(self, token_ids, token_positions=None, cache=None):
        hidden = self.hidden_states(token_ids, token_positions, cache)
        return self.lm_head.linear(hidden, self.token_embeddings.weight) + 0 * self.lm_head.weight.sum()


class PositionsOfTheModelIgnored(nn.TransformerLM):
    def hidden_states(self, token_ids, token_positions=None, cache=None):
        return super().hidden_states(token_ids, None, cache)


class AlwaysRotated(nn.TransformerLM):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options | {"position": "rope"})


class ProbabilitiesReturned(nn.TransformerLM):
    def forward(self, token_ids, token_positions=None, cache=None):
        return torch.log_softmax(super().forward(token_ids, token_positions, cache), dim=-1)


_model("final_norm_missing", "the last norm is left out", FinalNormMissing)
_model("layers_reversed", "the layers run in reverse", LayersReversed)
_model("last_layer_skipped", "the last layer is skipped", LastLayerSkipped)
_model("always_tied", "the projection uses the embeddings' weight unasked", AlwaysTied)
_model("positions_of_the_model_ignored", "token_positions are ignored", PositionsOfTheModelIgnored)
_model("always_rotated", 'position="none" is ignored', AlwaysRotated)
_model("log_probabilities_returned", "log-probabilities are returned, not logits", ProbabilitiesReturned)
_model("model_sees_the_future", "attention is not causal", attention=lambda right: lambda q, k, v, **o: right(q, k, v))
_model(
    "embeddings_scaled",
    "embeddings are multiplied by the root of d_model",
    embedding=lambda right: lambda ids, weight: right(ids, weight) * weight.shape[-1] ** 0.5,
)
