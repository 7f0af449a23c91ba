"""A Hugging Face Llama folder as a run: to generate from, to export again, and to read beside one's own runs.

The folder holds config.json, *.safetensors and tokenizer.json. Nothing in it is executed and no pickle is read. The run
appears only after transformers and the model here computed the same logits from the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..text import formats, samples, tokenizer_folder
from ..text.formats import Foreign, hugging_face
from . import accounting, llama, logit_gate, model
from .configuration import Configuration, ModelConfiguration, from_dict
from .export import check_free, staged
from .logit_gate import Agreement
from .progress import Progress
from .resolved import TRAINING, Resolved, resolve
from .run_folder import RunFolder
from .tokenization import RunTokenizer, read
from .training import FORMAT

ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
    "pretraining_tp": (1, None),
}
"""What config.json may say; everything else has no place in the model here."""
SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}


@dataclass(frozen=True)
class Imported:
    """The run that was made, and how well its logits agree with transformers'."""

    folder: Path
    configuration: Configuration
    agreement: Agreement


def import_(source: Path, out: Path, *, progress: Progress) -> Imported:
    """Make the run `out` from the folder `source`.

    Raises FileNotFoundError where a file is missing, ValueError where the model or the tokenizer can't be expressed
    here or the logits differ, and FileExistsError where `out` is taken. Nothing is left under `out` then.
    """
    check_free(out)
    content = read_json(source / "config.json")
    settings = model_settings(source, content)
    formats.needs("transformers", "importing a model, which is proven by comparing logits,")
    with staged(out) as staging:
        progress.say(f"reading {source} ...")
        folder = RunFolder(staging)
        tokenizer = _write_tokenizer(source, content, staging / "data" / "tokenizer")
        if tokenizer.size > settings["vocab_size"]:
            raise ValueError(
                f"{source}: tokenizer.json has ids up to {tokenizer.size - 1} and the model's vocab_size is "
                f"{settings['vocab_size']}: they do not belong together"
            )
        configuration = _configuration(source, settings, tokenizer)
        components = resolve("reference", "cpu", TRAINING)
        built = model.build(configuration, components["transformer_lm"], "cpu")
        load_weights(built, read_weights(source), configuration.model, source)
        progress.say("comparing logits with transformers ...")
        texts = [tokenizer.tokenizer.encode(samples.prose(2000, documents=4))]
        agreement = logit_gate.compare(source, built.eval(), texts, configuration.model.context_length)
        _write_run(folder, configuration, components, tokenizer, built, agreement)
    progress.say(f"{agreement}\n{out} is a run: cs336 generate {out}")
    return Imported(out, configuration, agreement)


def model_settings(source: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as [model]; raises ValueError with every reason why the model can't be expressed here."""
    reasons = [
        f"{key} = {content.get(key)!r}"
        for key, allowed in ALLOWED.items()
        if content.get(key) not in allowed and (key in content or None not in allowed)
    ]
    rope = content.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        reasons.append(f"rope_parameters.rope_type = {rope['rope_type']!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or content.get("partial_rotary_factor", 1.0) != 1.0:
        reasons.append("partial_rotary_factor is not 1")
    missing = [theirs for theirs in SIZES.values() if not isinstance(content.get(theirs), int)]
    if content.get("model_type") == "llama" and missing:
        raise ValueError(f"{source / 'config.json'} lacks {', '.join(missing)}: it is damaged or no Llama's")
    eps = content.get("rms_norm_eps", 1e-6)
    if eps != llama.NORM_EPS:
        reasons.append(f"rms_norm_eps = {eps!r} (every run here uses {llama.NORM_EPS!r})")
    if not reasons:
        d_head = content["hidden_size"] // content["num_attention_heads"]
        if (content.get("head_dim") or d_head) != d_head:
            reasons.append(
                f"head_dim = {content['head_dim']} (here it is hidden_size / num_attention_heads = {d_head})"
            )
    if reasons:
        raise ValueError(
            f"the model in {source} can't be expressed here: {'; '.join(reasons)}. Only Llama without biases and with "
            f"plain rotary positions can be imported"
        )
    settings = {ours: content[theirs] for ours, theirs in SIZES.items()}
    kv_heads = content.get("num_key_value_heads") or settings["num_heads"]
    settings["num_kv_heads"] = None if kv_heads == settings["num_heads"] else kv_heads
    settings["rope_theta"] = float(rope.get("rope_theta") or content.get("rope_theta") or 10_000.0)
    settings["tie_embeddings"] = bool(content.get("tie_word_embeddings", False))
    return settings


def read_weights(source: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files, in one file or in the shards that the index names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = source / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{index} names files outside {source}: it can't be trusted")
        paths = [source / name for name in names]
    else:
        paths = [source / "model.safetensors"]
    found: dict[str, Tensor] = {}
    for path in paths:
        if not path.is_file():
            pickles = sorted(one.name for one in source.glob("*.bin"))
            advice = f" ({pickles[0]} is a pickle, which is not read: save the model as safetensors)" if pickles else ""
            raise FileNotFoundError(f"there is no file {path}{advice}")
        try:
            found |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}): fetch it again") from None
    return found


def load_weights(
    built: torch.nn.Module, state: Mapping[str, Tensor], settings: ModelConfiguration, source: Path
) -> None:
    """Put Llama's weights into the model, every one of them and nothing else, in float32."""
    wanted = llama.names(settings)
    # Old files keep what can be computed, and some write a tied projection a second time.
    extra = {name for name in state if name not in wanted.values() and not name.endswith("rotary_emb.inv_freq")}
    if settings.tie_embeddings:
        extra.discard("lm_head.weight")
    missing = sorted(set(wanted.values()) - set(state))
    if missing or extra:
        raise ValueError(
            f"the weights in {source} are not those of its config.json: missing {missing[:3] or 'none'}, not known "
            f"{sorted(extra)[:3] or 'none'}"
        )
    found = llama.from_llama({name: state[name].float() for name in wanted.values()}, settings)
    for name, parameter in built.state_dict().items():
        if found[name].shape != parameter.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(found[name].shape)}, config.json makes it {tuple(parameter.shape)}"
            )
    built.load_state_dict(found)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: pass a folder that transformers' save_pretrained wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a JSON object")
    return content


def _write_tokenizer(source: Path, content: Mapping[str, Any], folder: Path) -> RunTokenizer:
    """tokenizer.json as a tokenizer folder, held against the tokenizers library."""
    path = source / "tokenizer.json"
    foreign = hugging_face.read(path)
    special = _end_of_text_first(foreign, content, path)
    tokenizer_folder.write(
        folder, foreign.vocab, foreign.merges, pattern=foreign.pattern, special_tokens=special, tie_break=None
    )
    tokenizer = read(folder, "reference")
    texts = list(formats.telling_texts(special, tuple(foreign.vocab.values())))
    theirs = hugging_face.encoder(path, foreign)
    formats.compare(tokenizer.tokenizer.encode, theirs, texts, f"tokenizers reads {path} otherwise")
    return tokenizer


def _end_of_text_first(foreign: Foreign, content: Mapping[str, Any], path: Path) -> list[str]:
    """The special tokens, the one that ends a text first: that is the one which stands between documents here."""
    end = content.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    text = foreign.vocab.get(end, b"").decode("utf-8", "replace") if isinstance(end, int) else ""
    if text not in foreign.special_tokens:
        raise ValueError(
            f"{path.parent / 'config.json'}: eos_token_id = {end!r} is no special token of tokenizer.json "
            f"({', '.join(foreign.special_tokens) or 'it has none'}): a run needs one to end texts with"
        )
    return [text, *(token for token in foreign.special_tokens if token != text)]


def _configuration(source: Path, settings: Mapping[str, Any], tokenizer: RunTokenizer) -> Configuration:
    content = {
        "name": source.resolve().name,
        "description": "imported from a Hugging Face Llama folder",
        "model": {name: value for name, value in settings.items() if value is not None},
        "tokenizer": {"special_tokens": list(tokenizer.metadata["special_tokens"])},
    }
    return from_dict(content, str(source / "config.json"))


def _write_run(
    folder: RunFolder,
    configuration: Configuration,
    components: Resolved,
    tokenizer: RunTokenizer,
    built: torch.nn.Module,
    agreement: Agreement,
) -> None:
    """Step 0 of a run."""
    from .checkpoints import Checkpoints

    counted = accounting.account(built, configuration.model)
    folder.write_record(
        configuration=configuration.to_dict(),
        decisions=dict(components.decisions),
        device="cpu",
        logits=agreement.to_dict(),
        accounting={
            "parameters": counted.parameters,
            "matmul_parameters": counted.matmul_parameters,
            "flops_per_token": counted.flops_per_token,
        },
    )
    checkpoints = Checkpoints(
        folder.checkpoints, components["save_checkpoint"], components["load_checkpoint"], keep_last=1, keep_best=False
    )
    state = {
        "format": FORMAT,
        "step": 0,
        "configuration": configuration.to_dict(),
        "components": components.fingerprints,
        "tokenizer": tokenizer.fingerprint,
        "best": None,
    }
    checkpoints.save(0, built, components["adamw"](built.parameters()), state)
