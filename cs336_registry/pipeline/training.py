"""Training: a run that can be killed at any step and, started again, gives the same losses and the same weights.

    summary = train(load("tinystories_17m"), Path("runs/tinystories"))

Before the data is prepared every component is chosen, once. A checkpoint is written before the evaluation of the same
step, so an evaluation that fails costs nothing. Exactness is bit for bit on the CPU, with as many threads and
processes.

Where torchrun started several processes they train together (parallel.py): each takes its rows of every batch, all take
the same decisions at the same step, and the first one alone prints and writes what is not sharded.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..cuda_graph import CapturedPass
from . import accounting, fused_loss, generation, model, parallel, process_group, run_data, sinks
from .checkpoints import Checkpoints, State
from .configuration import Configuration
from .errors import DivergedError, RunError
from .evaluation import Evaluation, evaluate
from .metrics import MetricsLog, Row, SilentLog, Watcher, of_kind
from .parallel import Parallel
from .process_group import ProcessGroup
from .progress import Progress, Stage
from .resolved import Resolved, resolve
from .run_data import RunData
from .run_folder import RunFolder
from .sameness import check_same_run
from .sampler import Sampler
from .sharded_checkpoint import WholeTensors
from .stopping import stop_between_steps

FORMAT = "cs336 run 1"


@dataclass(frozen=True)
class Summary:
    """Where a run stands. seconds: wall-clock of training and evaluating, interruptions left out."""

    folder: Path
    step: int
    seconds: float
    evaluation: Evaluation
    samples: tuple[str, ...]


def train(
    configuration: Configuration,
    out: Path,
    *,
    resume: bool = True,
    progress: Progress | None = None,
    watchers: Sequence[Watcher] = (),
) -> Summary:
    """Train as `configuration` says, in `out`; continue the run that is there, if any.

    watchers see every row of metrics. Raises MismatchError where the run in `out` is of another configuration, backend
    or tokenizer, DivergedError for a loss that is no number, RunError for a full disk or a locked folder, and
    FileExistsError for a run that is there with resume=False.
    In a process group (torch.distributed) every process must call this, and `out` must be one folder for all.
    """
    group = process_group.current()
    check_divisible(configuration, group)
    chosen = choose(configuration, group)
    progress = progress if group.first and progress else Progress(quiet=not group.first)
    folder = RunFolder(out)
    with ExitStack() as stack:
        watching = [*watchers]

        def prepare() -> RunData:
            return run_data.prepare(configuration, folder.data(configuration.data.folder), progress)

        def open_and_prepare() -> RunData:
            if not resume and folder.metrics_path.is_file():
                raise FileExistsError(f"{out} holds a run: continue it (without --no-resume), or choose another --out")
            stack.enter_context(folder.locked())
            watching.extend(stack.enter_context(sinks.opened(configuration, folder)))
            return prepare()

        data = group.prepared(open_and_prepare, prepare)
        return Trainer(configuration, chosen, data, folder, progress, group, watching).run()


def check_divisible(configuration: Configuration, group: ProcessGroup) -> None:
    """Every process needs as many rows as the others, in every part of a batch."""
    batch, parts = configuration.training.batch_size, configuration.training.gradient_accumulation
    if batch % (group.world_size * parts):
        divided = f"{group.world_size} processes" + (f" and gradient_accumulation = {parts}" if parts > 1 else "")
        raise RunError(
            f"training.batch_size = {batch} can't be divided among {divided}: set it to a multiple of "
            f"{group.world_size * parts}, or start another number of processes"
        )


@dataclass(frozen=True)
class Chosen:
    """Where a run computes and with what.

    strategy: the components that several processes share the work with; loss: what takes the loss without logits.
    """

    device: str
    components: Resolved
    strategy: Resolved
    loss: Resolved


def choose(configuration: Configuration, group: ProcessGroup) -> Chosen:
    """Done before the data is prepared, which may take long: what can't be served here is told at once."""
    device = model.choose_device(configuration.training.device)
    if configuration.training.cuda_graph and (device != "cuda" or not group.alone):
        where = f"{group.world_size} processes" if not group.alone else f"device {device!r}"
        raise RunError(f"training.cuda_graph = true needs one process with a GPU, and this is {where}: set it to false")
    components = resolve(configuration.backend, device)
    return Chosen(
        device,
        components,
        parallel.components_of(configuration, device, group),
        fused_loss.components_of(configuration, device, group, components),
    )


class Trainer:
    """The state of a run between two steps."""

    def __init__(
        self,
        configuration: Configuration,
        chosen: Chosen,
        data: RunData,
        folder: RunFolder,
        progress: Progress,
        group: ProcessGroup,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        self.configuration, self.data, self.folder, self.progress = configuration, data, folder, progress
        self.group, self.watchers = group, watchers
        training = configuration.training
        self.device, self.components, self.chosen = chosen.device, chosen.components, chosen
        self.model = self._build(self.device)
        self.accounting = accounting.account(self.model, configuration.model)
        self.parallel = Parallel(
            model.recomputing(self.model, configuration), configuration, self.components, chosen.strategy, group
        )
        self.loss_of = self._loss_of_logits
        if without_logits := fused_loss.from_hidden_states(self.model, chosen.loss, configuration):
            self.loss_of = model.compiled(without_logits, configuration)
        self.captured: CapturedPass | None = None
        if training.cuda_graph:
            self.captured = CapturedPass(self._loss, [part.parameter for part in self.parallel.parts])
        self.sampler = Sampler(
            self.components["get_batch"],
            data.train.ids,
            batch_size=training.batch_size,
            context_length=configuration.model.context_length,
            device=self.device,
            seed=training.seed,
        )
        self.checkpoints = Checkpoints(
            folder.checkpoints,
            self.components["save_checkpoint"],
            self.components["load_checkpoint"],
            keep_last=configuration.checkpoint.keep_last,
            keep_best=configuration.checkpoint.keep_best,
            group=group,
        )
        self.token_bytes = data.tokenizer.token_bytes()
        self.token_bytes += [0] * (configuration.model.vocab_size - len(self.token_bytes))
        self.step = 0
        self.saved_step: int | None = None
        self.best: tuple[int, float] | None = None
        self.evaluation: Evaluation | None = None
        self.samples: tuple[str, ...] = ()
        self._pending: list[tuple[int, float, torch.Tensor, torch.Tensor]] = []
        self._seconds_before = 0.0

    def run(self) -> Summary:
        """Train to the last step, from the last checkpoint where there is one."""
        self._resume()
        self._start = self._flushed = time.monotonic()
        self.log = MetricsLog(self.folder.metrics_path, self.watchers) if self.group.first else SilentLog()
        threads, processes = torch.get_num_threads(), self.group.world_size
        self.log.append("resume", self.step if self.step else -1, threads=threads, processes=processes)
        total = self.configuration.training.steps
        try:
            with (
                self.progress.stage("training", total, "steps", self.step) as stage,
                self.group.in_contact(self._kept),
                stop_between_steps() as stopped,
            ):
                self._between_steps(stopped)
                while self.step < total:
                    self._train_step()
                    self._flush_when_due(stage)
                    stage.advance(1)
                    self._between_steps(stopped)
        finally:
            self.log.flush(sync=True)
            self.log.close()
        assert self.evaluation is not None, "the last step is always evaluated"
        return Summary(self.folder.path, self.step, self._seconds(), self.evaluation, self.samples)

    def _train_step(self) -> None:
        """One optimizer step: the batch in parts, clipped, at this step's learning rate."""
        training, clip = self.configuration.training, self.configuration.optimizer.max_gradient_norm
        lr = self._learning_rate()
        for parameters in self.parallel.optimizer.param_groups:
            parameters["lr"] = lr
        inputs, targets = (self._own_rows(rows) for rows in self.sampler.batch())
        if self.captured is not None:
            loss = self.captured(inputs, targets)
        else:
            loss = self._differentiate(inputs, targets, training.gradient_accumulation)
        norm = self.parallel.clip(math.inf if clip is None else clip)
        self.parallel.step()
        self.step += 1
        self._pending.append((self.step, lr, loss, norm))

    def _differentiate(self, inputs: torch.Tensor, targets: torch.Tensor, parts: int) -> torch.Tensor:
        """The batch's loss, after its backward pass, in `parts`."""
        loss = torch.zeros((), device=self.device)
        for part in range(parts):
            part_inputs, part_targets = inputs.chunk(parts)[part], targets.chunk(parts)[part]
            with self.parallel.accumulating(last=part == parts - 1):
                part_loss = self._loss(part_inputs, part_targets) / parts
                part_loss.backward()
            loss += part_loss.detach()
            self.parallel.finish_gradients()
        return loss

    def _loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            return self.loss_of(inputs, targets)

    def _loss_of_logits(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.components["cross_entropy"](self.parallel.forward(inputs), targets)

    def _own_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """This process's rows of what all have drawn, so that the batches are those of one process."""
        return rows.chunk(self.group.world_size)[self.group.rank]

    def _learning_rate(self) -> float:
        lr, schedule = self.configuration.optimizer.lr, self.configuration.schedule
        return self.components["lr_cosine_schedule"](
            self.step + 1, lr, lr * schedule.min_lr_fraction, schedule.warmup_steps, self.configuration.cosine_steps
        )

    def _between_steps(self, stopped: threading.Event) -> None:
        """Save and evaluate where it is time to; leave, saved, where the process was asked to stop."""
        last = self.step == self.configuration.training.steps
        stop = self.group.any(stopped.is_set())
        due = self.step and (last or self.step % self.configuration.checkpoint.every == 0)
        evaluation_due = last or self.step % self.configuration.evaluation.every == 0
        if (stop or due) and self.step != self.saved_step:
            self._flush()
            self._save()
        if stop:
            self.progress.say(f"stopped at step {self.step}; the same command continues from here")
            raise KeyboardInterrupt
        if evaluation_due and not self._evaluated(last):
            self._flush()
            self._evaluate(last)
        if due or evaluation_due:
            self.checkpoints.prune(self.best[0] if self.best else None)

    def _evaluated(self, last: bool) -> bool:
        """Whether this step's evaluation (the last: with its samples) is in the metrics, from before a restart."""
        rows = [row for row in self._known if row["step"] == self.step]
        if last and not of_kind(rows, "end"):
            return False
        for row in of_kind(rows, "evaluation"):
            self.evaluation = Evaluation(**{name: row[name] for name in Evaluation.__dataclass_fields__})
            self._note_best(self.evaluation)
        self.samples = tuple(row["text"] for row in of_kind(rows, "sample"))
        return bool(of_kind(rows, "evaluation"))

    def _evaluate(self, last: bool) -> None:
        """Measure on the validation tokens; at the last step on (nearly) all of them, with samples."""
        settings, training = self.configuration.evaluation, self.configuration.training
        with self._autocast():
            self.evaluation = evaluate(
                self.parallel.module,
                self.data.validation.ids,
                self.token_bytes,
                self.components["cross_entropy"],
                context_length=self.configuration.model.context_length,
                sequences=settings.final_sequences if last else settings.sequences,
                batch_size=max(1, training.batch_size // training.gradient_accumulation // self.group.world_size),
                device=self.device,
                group=self.group,
            )
        found = self.evaluation
        self.log.append("evaluation", self.step, seconds=self._seconds(), **found.to_dict())
        self.log.flush()
        if not last:
            # The last evaluation reads other windows, so it does not compete with the ones before.
            self._note_best(found)
        else:
            self._sample()
            self.log.append("end", self.step, seconds=self._seconds(), peak_memory=accounting.peak_memory(self.device))
            self.log.flush(sync=True)
        self.progress.say(
            f"step {self.step}: validation loss {found.loss:.4f}, perplexity {found.perplexity:.2f}, "
            f"{found.bits_per_byte:.4f} bits per byte"
        )
        # Evaluating is not training: it must not lower the next steps' rate.
        self._flushed = time.monotonic()

    def _sample(self) -> None:
        settings = self.configuration.evaluation
        if not settings.sample_tokens:
            return
        prompts, start = settings.prompts, time.monotonic()
        with self._autocast():
            texts = generation.sample(
                self.model,
                self.data.tokenizer,
                self.components["generate"],
                prompts,
                max_new_tokens=settings.sample_tokens,
                context_length=self.configuration.model.context_length,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=self.configuration.training.seed,
                device=self.device,
            )
        took = (time.monotonic() - start) / len(prompts)
        for prompt, text in zip(prompts, texts, strict=True):
            self.log.append("sample", self.step, prompt=prompt, text=text, seconds_each=took)
        self.samples = tuple(texts)

    def _note_best(self, found: Evaluation) -> None:
        if self.step == self.saved_step and (self.best is None or found.loss < self.best[1]):
            self.best = (self.step, found.loss)

    def _flush_when_due(self, stage: Stage) -> None:
        """Losses are read from a GPU every few steps only, so that it need not wait; on the CPU at every step."""
        if self.device == "cpu" or self.step % self.configuration.training.log_every == 0:
            row = self._flush()
            stage.note(f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s" if row else "")

    def _flush(self) -> dict[str, Any] | None:
        """Write the pending steps' rows; DivergedError for the first loss that is no number."""
        if not self._pending:
            return None
        # The mean over the processes, each of which had as many rows.
        totals = self.group.total(torch.stack([loss for _, _, loss, _ in self._pending]).float())
        losses = (totals / self.group.world_size).tolist()
        norms = torch.stack([norm for *_, norm in self._pending]).float().tolist()
        now = time.monotonic()
        each = (now - self._flushed) / len(self._pending)
        rate = self.configuration.tokens_per_step / max(each, 1e-9)
        peak = accounting.peak_flops(self.device, self.configuration.training.precision)
        peak = peak and peak * self.group.world_size
        row = None
        for number, ((step, lr, *_), loss, norm) in enumerate(zip(self._pending, losses, norms, strict=True), start=1):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._diverged(step, lr, loss, norm)
            seconds = self._seconds_before + self._flushed - self._start + each * number
            row = {"loss": loss, "lr": lr, "gradient_norm": norm, "seconds": seconds, "tokens_per_second": rate}
            if peak:
                row["mfu"] = rate * self.accounting.flops_per_token / peak
            self.log.append("step", step, **row)
        self.log.flush()
        self._pending.clear()
        self._flushed = time.monotonic()
        return row

    def _diverged(self, step: int, lr: float, loss: float, norm: float) -> None:
        self.log.append("divergence", step, lr=lr, loss=f"{loss:.6g}", gradient_norm=f"{norm:.6g}")
        self.log.flush(sync=True)
        raise DivergedError(
            f"training diverged at step {step}: loss {loss}, gradient norm {norm}, learning rate {lr:.2e}; "
            f"{self._kept()}. Lower optimizer.lr, lengthen schedule.warmup_steps, or lower optimizer.max_gradient_norm"
        )

    def _save(self) -> None:
        self.log.flush(sync=True)
        self.checkpoints.save(
            self.step,
            self.model,
            self.parallel.optimizer,
            {
                "format": FORMAT,
                "step": self.step,
                "configuration": self.configuration.to_dict(),
                "components": self.components.fingerprints,
                "tokenizer": self.data.tokenizer.fingerprint,
                "sampler": self.sampler.state,
                "seconds": self._seconds(),
                "threads": torch.get_num_threads(),
                "processes": self.group.world_size,
                "best": self.best,
            },
            None if self.group.alone else self.parallel.tensors(),
        )
        self.saved_step = self.step
        # Writing a checkpoint is not training: it must not lower the next steps' rate.
        self._flushed = time.monotonic()

    def _resume(self) -> None:
        """Record the run, or continue it where the last checkpoint is, after checking that it is the same run."""
        state, metrics = self.group.decided(self._last_saved)
        if state:
            check_same_run(state, self.configuration, self.components, self.data.tokenizer, self.folder)
            self._load(state["step"])
            self.step = self.saved_step = state["step"]
            self._seconds_before = state["seconds"]
            self.sampler.state = state["sampler"]
            self.best = tuple(state["best"]) if state["best"] else None
            if self.device == "cpu" and state.get("processes", 1) == self.group.world_size:
                torch.set_num_threads(state["threads"])
            self.progress.say(f"continuing from step {self.step} of {self.configuration.training.steps}")
        self._known = [row for row in metrics if row["step"] <= self.step] if state else []
        if self.group.first:
            self._write_record()

    def _write_record(self) -> None:
        self.folder.write_record(
            configuration=self.configuration.to_dict(),
            decisions={
                **self.data.tokenizer.metadata.get("decisions", {}),
                **self.components.decisions,
                **self.chosen.strategy.decisions,
                **self.chosen.loss.decisions,
            },
            device=self.device,
            processes=self.group.world_size,
            corpus=self.data.corpus.to_dict(),
            tokenizer=self.data.tokenizer_facts(),
            baselines=self.data.baselines,
            accounting={
                "parameters": self.accounting.parameters,
                "matmul_parameters": self.accounting.matmul_parameters,
                "flops_per_token": self.accounting.flops_per_token,
            },
        )

    def _last_saved(self) -> tuple[State | None, list[Row]]:
        """What the last checkpoint says beside its tensors, and the metrics, as the first process sees them."""
        steps = self.checkpoints.steps()
        return (self.checkpoints.state(steps[-1]), self.folder.metrics()) if steps else (None, [])

    def _load(self, step: int) -> None:
        """The weights and the optimizer's states, whatever number of processes wrote them."""
        with self.checkpoints.reading(step):
            shards = self.checkpoints.shards(step)
            if shards is not None:
                self.parallel.load(shards)
            elif self.group.alone:
                self.checkpoints.load(step, self.model, self.parallel.optimizer)
            else:
                whole = self._build("cpu")
                optimizer = self.components["adamw"](whole.parameters())
                self.checkpoints.load(step, whole, optimizer)
                self.parallel.load(WholeTensors(whole, optimizer))

    def _build(self, device: str) -> torch.nn.Module:
        return model.build(self.configuration, self.components["transformer_lm"], device)

    def _kept(self) -> str:
        steps = self.checkpoints.steps()
        return f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint was written before"

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.configuration.training.precision == "bfloat16")

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._start
