"""Every hyper-parameter of a run in one typed, frozen configuration, read from TOML and `--set section.key=value`.

    configuration = load("tinystories_17m", ["optimizer.lr=3e-4", "training.precision=float32"])

Unknown keys are refused with the closest known one, values with what was expected, so a typing error costs no run.
TOML has no null: "none" stands for it where a key may go without a value.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from ..errors import ConfigurationError, suggestion

Count = Annotated[int, msgspec.Meta(ge=1)]
CountOrNone = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, lt=1)]

STANDARD_LIBRARY = "standard-library"
"""The corpus that every machine has: the interpreter's own sources."""


@dataclass(frozen=True, kw_only=True)
class ModelConfiguration:
    """The Transformer language model."""

    vocab_size: Count = 10_000
    context_length: Count = 256
    d_model: Count = 512
    num_layers: Count = 4
    num_heads: Count = 16
    num_kv_heads: Count | None = None
    d_ff: Count = 1344
    rope_theta: Positive = 10_000.0
    norm: Literal["rms", "none", "post"] = "rms"
    """Where RMSNorm stands: "rms" before each sublayer, "post" after it, "none" nowhere."""
    position: Literal["rope", "none"] = "rope"
    ffn: Literal["swiglu", "silu"] = "swiglu"
    tie_embeddings: bool = False
    """The projection to logits shares the embeddings' weight."""

    def problem(self) -> str | None:
        if self.d_model % self.num_heads:
            return (
                f"d_model = {self.d_model} can't be divided among num_heads = {self.num_heads}: choose a divisor of "
                f"{self.d_model}"
            )
        if self.position == "rope" and self.d_model // self.num_heads % 2:
            return (
                f"each head has d_model / num_heads = {self.d_model // self.num_heads} features, and rope rotates "
                f'pairs: make it even, or set position = "none"'
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            return f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}: choose a divisor"
        return None


@dataclass(frozen=True, kw_only=True)
class DataConfiguration:
    """The text, and where what is made of it is kept."""

    train: str | tuple[str, ...] = STANDARD_LIBRARY
    """A path (text, .gz, .zst, .jsonl, .parquet, a folder, a glob), several, or "standard-library"; or one .npy file of
    cs336 data encode, with another for validation and the tokenizer's folder in tokenizer.path."""
    validation: str | tuple[str, ...] | None = None
    """The same for validation; without it, `validation_fraction` of the documents of `train` are held out."""
    validation_fraction: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.05
    maximum_bytes: Count | None = None
    """Read at most about this many bytes of text."""
    folder: str | None = None
    """Where tokenizer and tokens are kept, for runs that share them; default: the run's own folder."""

    @property
    def is_encoded(self) -> bool:
        """Whether `train` is a file of tokens."""
        return _is_tokens(self.train)

    def problem(self) -> str | None:
        if self.is_encoded != (self.validation is not None and _is_tokens(self.validation)):
            return (
                f"train = {self.train!r}, validation = {self.validation!r}: tokens are taken for both or for neither; "
                f"cs336 data encode makes a .npy file of a text"
            )
        if self.is_encoded and self.maximum_bytes is not None:
            return f"maximum_bytes = {self.maximum_bytes} cuts text, and {self.train} holds tokens: leave it out"
        return None


@dataclass(frozen=True, kw_only=True)
class TokenizerConfiguration:
    """The byte-pair tokenizer; its size is model.vocab_size."""

    path: str | None = None
    """A folder with vocab.json and merges.txt to use instead of training."""
    pattern: Literal["gpt2", "cl100k"] = "gpt2"
    tie_break: Literal["greatest_bytes", "smallest_ids"] = "greatest_bytes"
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    """The first one stands between documents."""

    def problem(self) -> str | None:
        if not self.special_tokens or not all(self.special_tokens):
            return f"special_tokens = {list(self.special_tokens)} needs one to stand between documents: <|endoftext|>"
        return None


@dataclass(frozen=True, kw_only=True)
class OptimizerConfiguration:
    """AdamW and gradient clipping."""

    lr: Positive = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1
    max_gradient_norm: Positive | None = 1.0
    """None: the norm is measured and nothing is clipped."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfiguration:
    """Linear warm-up to optimizer.lr, then a cosine down to min_lr_fraction of it."""

    warmup_steps: CountOrNone = 100
    min_lr_fraction: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    cosine_steps: Count | None = None
    """The step at which the cosine ends; default: training.steps."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfiguration:
    """How many tokens, how fast, in which precision."""

    steps: Count = 1000
    batch_size: Count = 32
    """Sequences per optimizer step, over all gradient accumulation."""
    gradient_accumulation: Count = 1
    """Parts that a batch is computed in, to need less memory."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: weights stay float32, matrix products run in bfloat16 (autocast)."""
    compile: bool = False
    cuda_graph: bool = False
    """Capture the forward and backward passes once and replay them: for models so small that a GPU waits for Python."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass instead of keeping them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: CountOrNone = 0
    log_every: Count = 10

    def problem(self) -> str | None:
        if self.batch_size % self.gradient_accumulation:
            return (
                f"batch_size = {self.batch_size} can't be divided by gradient_accumulation = "
                f"{self.gradient_accumulation}: choose a divisor"
            )
        if self.cuda_graph and (self.gradient_accumulation > 1 or self.device == "cpu"):
            return (
                f"cuda_graph = true replays a whole batch on a GPU, but gradient_accumulation = "
                f"{self.gradient_accumulation} and device = {self.device!r}: set cuda_graph = false"
            )
        return None


@dataclass(frozen=True, kw_only=True)
class EvaluationConfiguration:
    """Loss on the validation tokens, and samples."""

    every: Count = 250
    sequences: Count = 256
    """Validation windows per evaluation, spread evenly; the last evaluation reads all windows up to final_sequences."""
    final_sequences: Count = 4096
    prompts: tuple[str, ...] = ("",)
    sample_tokens: CountOrNone = 256
    temperature: NotNegative = 0.8
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.95


@dataclass(frozen=True, kw_only=True)
class CheckpointConfiguration:
    """When the run is saved, and how many saves are kept (the best one is kept beside them)."""

    every: Count = 250
    keep_last: Count = 2
    keep_best: bool = True


@dataclass(frozen=True, kw_only=True)
class ParallelConfiguration:
    """How the processes that torchrun starts share the work; one process alone does all of it."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each has the whole model. fsdp: each keeps a part of weights, gradients and optimizer states."""
    shard_optimizer: bool = False
    """With ddp: each keeps a part of the optimizer's states (ZeRO, stage 1)."""
    timeout: Positive = 600.0
    """Seconds after which a process that waits for another gives up."""

    def problem(self) -> str | None:
        if self.shard_optimizer and self.strategy == "fsdp":
            return (
                'shard_optimizer = true belongs to strategy = "ddp": "fsdp" shards the states anyway, so leave it out'
            )
        return None


@dataclass(frozen=True, kw_only=True)
class MetricsConfiguration:
    """Where metrics go beside metrics.jsonl."""

    sinks: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Each needs the extra of the same name: pip install 'cs336-registry[tensorboard]'."""
    project: str = "cs336"
    """What trackio and wandb file the run under."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A run. `backend` is a selector, such as "triton,adamw=torch"; without it the active selection decides."""

    name: str = "run"
    description: str = ""
    backend: str | None = None
    text_backend: str | None = None
    """The selector of pretoken_counter, bpe_trainer and tokenizer; default: `backend`."""
    model: ModelConfiguration = field(default_factory=ModelConfiguration)
    data: DataConfiguration = field(default_factory=DataConfiguration)
    tokenizer: TokenizerConfiguration = field(default_factory=TokenizerConfiguration)
    optimizer: OptimizerConfiguration = field(default_factory=OptimizerConfiguration)
    schedule: ScheduleConfiguration = field(default_factory=ScheduleConfiguration)
    training: TrainingConfiguration = field(default_factory=TrainingConfiguration)
    parallel: ParallelConfiguration = field(default_factory=ParallelConfiguration)
    evaluation: EvaluationConfiguration = field(default_factory=EvaluationConfiguration)
    checkpoint: CheckpointConfiguration = field(default_factory=CheckpointConfiguration)
    metrics: MetricsConfiguration = field(default_factory=MetricsConfiguration)

    @property
    def tokens_per_step(self) -> int:
        return self.training.batch_size * self.model.context_length

    @property
    def cosine_steps(self) -> int:
        return self.schedule.cosine_steps or self.training.steps

    def problem(self) -> str | None:
        if self.data.is_encoded and self.tokenizer.path is None:
            return f"data.train = {self.data.train!r} holds tokens: name their tokenizer's folder in tokenizer.path"
        if self.schedule.warmup_steps >= self.cosine_steps:
            end = "training.steps" if self.schedule.cosine_steps is None else "schedule.cosine_steps"
            return (
                f"schedule.warmup_steps = {self.schedule.warmup_steps} leaves no step for the cosine, which ends at "
                f"{end} = {self.cosine_steps}: set schedule.warmup_steps below that, or raise {end}"
            )
        smallest = 256 + len(self.tokenizer.special_tokens)
        if self.model.vocab_size < smallest:
            return (
                f"model.vocab_size = {self.model.vocab_size} is below {smallest}, the 256 bytes and the special "
                f"tokens: choose {smallest} or more"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, section by section, defaults included, which msgspec leaves out of the objects it read."""
        return msgspec.json.decode(msgspec.json.encode(dataclasses.asdict(self)))

    def to_toml(self) -> str:
        """A file that `load` reads as this configuration, defaults included."""
        content = self.to_dict()
        sections = {key: content.pop(key) for key, value in list(content.items()) if isinstance(value, dict)}
        blocks = [_toml_lines(content), *(f"[{name}]\n{_toml_lines(section)}" for name, section in sections.items())]
        return "\n".join(blocks)


def _is_tokens(inputs: str | tuple[str, ...]) -> bool:
    return isinstance(inputs, str) and inputs.endswith(".npy")


FREE_TO_CHANGE = (
    "name",
    "description",
    "parallel",
    "evaluation",
    "checkpoint",
    "metrics",
    "data.folder",
    "training.log_every",
    "training.steps",
)
"""What may differ when a run is continued, because it changes no weight (the schedule's length is compared apart)."""


def shipped() -> tuple[str, ...]:
    """The names of the configurations that come with the package."""
    folder = files("cs336_registry.pipeline") / "configurations"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load(source: str | Path, settings: Sequence[str] = ()) -> Configuration:
    """The configuration in a TOML file, or shipped under a name, with `settings` ("optimizer.lr=3e-4") applied."""
    path = Path(source)
    if path.is_file():
        text, origin = path.read_bytes(), str(path)
    elif str(source) in shipped():
        text, origin = (
            (files("cs336_registry.pipeline") / "configurations" / f"{source}.toml").read_bytes(),
            f"{source}.toml",
        )
    else:
        raise ConfigurationError(
            f"there is no configuration {str(source)!r}: pass a TOML file, or one that is shipped: "
            f"{suggestion(str(source), shipped())}"
        )
    try:
        content = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{origin} is not TOML: {error}") from None
    for setting in settings:
        _apply(content, setting)
    return from_dict(_with_nulls(content), origin)


def from_dict(content: Mapping[str, Any], origin: str = "configuration") -> Configuration:
    """`content` as a Configuration; `origin` is named in errors."""
    _refuse_unknown_keys(content, Configuration, "", origin)
    try:
        configuration = msgspec.convert(content, Configuration)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{origin}: {_describe(error, content)}") from None
    parts = {field.name: getattr(configuration, field.name) for field in dataclasses.fields(configuration)}
    for section, part in {"": configuration, **parts}.items():
        problem = (part.problem() if hasattr(part, "problem") else None) or _not_finite(part)
        if problem:
            raise ConfigurationError(f"{origin}: {section + ': ' if section else ''}{problem}")
    return configuration


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value in one, value in other) where two configurations as plain data would train other weights."""
    first, second = _flat(one), _flat(other)
    found = []
    for key in sorted({*first, *second}):
        if key in FREE_TO_CHANGE or key.partition(".")[0] in FREE_TO_CHANGE:
            continue
        if first.get(key) != second.get(key):
            found.append((key, first.get(key), second.get(key)))
    return found


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    if "training.steps" in flat:
        flat["schedule.cosine_steps"] = flat.get("schedule.cosine_steps") or flat["training.steps"]
    return flat


def _apply(content: dict[str, Any], setting: str) -> None:
    """Put "section.key=value" into `content`; the value is TOML, or else plain text."""
    key, equals, text = setting.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not name or len(sections) > 1:
        raise ConfigurationError(f"can't read --set {setting!r}: write section.key=value, such as optimizer.lr=3e-4")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    target = content
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigurationError(f"can't read --set {setting!r}: {section!r} is a value, not a section")
    target[name] = value


def _with_nulls(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`content` with None in place of "none", where a key may go without a value."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        is_null = value == "none" and type(None) in get_args(_type_at(prefix + key))
        found[key] = _with_nulls(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None if is_null else value
    return found


def _toml_lines(content: Mapping[str, Any]) -> str:
    """Numbers, strings and lists are written in TOML as in JSON, except that JSON lets DEL stand as it is."""
    values = {key: json.dumps("none" if value is None else value, ensure_ascii=False) for key, value in content.items()}
    return "".join(f"{key} = {value}\n" for key, value in values.items()).replace("\x7f", "\\u007f")


def _type_at(key: str) -> Any:
    kind: Any = Configuration
    for part in key.split("."):
        kind = get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    return kind


def _refuse_unknown_keys(content: Mapping[str, Any], kind: type, prefix: str, origin: str) -> None:
    known = get_type_hints(kind)
    for key, value in content.items():
        if key not in known:
            raise ConfigurationError(f"{origin}: unknown key {prefix + key!r}: {suggestion(key, known)}")
        if dataclasses.is_dataclass(known[key]) and isinstance(value, Mapping):
            _refuse_unknown_keys(value, known[key], f"{prefix}{key}.", origin)


def _describe(error: msgspec.ValidationError, content: Mapping[str, Any]) -> str:
    """The key, its value, what was expected and, for a choice, what there is to choose from."""
    message, _, path = str(error).partition(" - at `$")
    key = path.rstrip("`").lstrip(".").partition("[")[0]
    value: Any = content
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else value
    hint = _type_at(key)
    if get_origin(hint) is Literal:
        return f"{key} = {value!r}: {suggestion(str(value), map(str, get_args(hint)))}"
    message = message.replace("`", "").replace(" | null", ' or "none"')
    return f"{key} = {value!r}: {message[:1].lower()}{message[1:]}"


def _not_finite(part: Any) -> str | None:
    if not dataclasses.is_dataclass(part):
        return None
    for entry in dataclasses.fields(part):
        value = getattr(part, entry.name)
        if isinstance(value, float) and not math.isfinite(value):
            return f"{entry.name} = {value}: it must be a finite number"
    return None
