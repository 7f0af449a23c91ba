"""Training: a run that can be killed at any step and, started again, gives the same losses and the same weights.

    summary = train(load("tinystories_17m"), Path("runs/tinystories"))

Before the first step every component is chosen, once. A checkpoint is written before the evaluation of the same step,
so an evaluation that fails costs nothing. Exactness is bit for bit on the CPU, with as many threads.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import accounting, generation, model, run_data
from .checkpoints import Checkpoints
from .configuration import Configuration
from .errors import RunError
from .evaluation import Evaluation, evaluate
from .metrics import MetricsLog, of_kind
from .progress import Progress, Stage
from .resolved import Resolved, resolve
from .run_data import RunData
from .run_folder import RunFolder
from .sameness import check_same_run
from .sampler import Sampler
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


def train(configuration: Configuration, out: Path, *, resume: bool = True, progress: Progress | None = None) -> Summary:
    """Train as `configuration` says, in `out`; continue the run that is there, if any.

    Raises MismatchError where the run in `out` is of another configuration, backend or tokenizer, RunError for a loss
    that is no number, a full disk or a locked folder, and FileExistsError for a run that is there with resume=False.
    """
    progress = progress or Progress()
    folder = RunFolder(out)
    if not resume and folder.metrics_path.is_file():
        raise FileExistsError(f"{out} holds a run: continue it (without --no-resume), or choose another --out")
    with folder.locked():
        data = run_data.prepare(configuration, folder.data(configuration.data.folder), progress)
        return Trainer(configuration, data, folder, progress).run()


class Trainer:
    """The state of a run between two steps."""

    def __init__(self, configuration: Configuration, data: RunData, folder: RunFolder, progress: Progress) -> None:
        self.configuration, self.data, self.folder, self.progress = configuration, data, folder, progress
        training, optimizer = configuration.training, configuration.optimizer
        self.device = model.choose_device(training.device)
        self.components: Resolved = resolve(configuration.backend, self.device)
        self.model = model.build(configuration, self.components["transformer_lm"], self.device)
        self.forward = model.for_training(self.model, configuration)
        self.optimizer = self.components["adamw"](
            self.model.parameters(), optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay
        )
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
        )
        self.accounting = accounting.account(self.model, configuration.model)
        self.token_bytes = data.tokenizer.token_bytes()
        self.token_bytes += [0] * (configuration.model.vocab_size - len(self.token_bytes))
        self.step = 0
        self.best: tuple[int, float] | None = None
        self.evaluation: Evaluation | None = None
        self.samples: tuple[str, ...] = ()
        self._pending: list[tuple[int, float, torch.Tensor, torch.Tensor]] = []
        self._seconds_before = 0.0

    def run(self) -> Summary:
        """Train to the last step, from the last checkpoint where there is one."""
        self._resume()
        self._start = self._flushed = time.monotonic()
        self.log = MetricsLog(self.folder.metrics_path)
        self.log.append("resume", self.step if self.step else -1, threads=torch.get_num_threads())
        total = self.configuration.training.steps
        try:
            with self.progress.stage("training", total, "steps", self.step) as stage, stop_between_steps() as stopped:
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
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = self.sampler.batch()
        parts = training.gradient_accumulation
        loss = torch.zeros((), device=self.device)
        for part_inputs, part_targets in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            with self._autocast():
                part_loss = self.components["cross_entropy"](self.forward(part_inputs), part_targets) / parts
            part_loss.backward()
            loss += part_loss.detach()
        norm = self.components["gradient_clipping"](self.model.parameters(), math.inf if clip is None else clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._pending.append((self.step, lr, loss, norm))

    def _learning_rate(self) -> float:
        lr, schedule = self.configuration.optimizer.lr, self.configuration.schedule
        return self.components["lr_cosine_schedule"](
            self.step + 1, lr, lr * schedule.min_lr_fraction, schedule.warmup_steps, self.configuration.cosine_steps
        )

    def _between_steps(self, stopped: threading.Event) -> None:
        """Save and evaluate where it is time to; leave, saved, where the process was asked to stop."""
        last = self.step == self.configuration.training.steps
        saved = self.step in self.checkpoints.steps()
        due = self.step and (last or self.step % self.configuration.checkpoint.every == 0)
        evaluation_due = last or self.step % self.configuration.evaluation.every == 0
        if stopped.is_set() or (due and not saved):
            self._flush()
            self._save()
        if stopped.is_set():
            self.progress.say(f"stopped at step {self.step}; the same command continues from here")
            raise KeyboardInterrupt
        if evaluation_due and not self._evaluated(last):
            self._flush()
            self._evaluate(last)
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
                self.model,
                self.data.validation.ids,
                self.token_bytes,
                self.components["cross_entropy"],
                context_length=self.configuration.model.context_length,
                sequences=settings.final_sequences if last else settings.sequences,
                batch_size=max(1, training.batch_size // training.gradient_accumulation),
                device=self.device,
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
        if self.step in self.checkpoints.steps() and (self.best is None or found.loss < self.best[1]):
            self.best = (self.step, found.loss)

    def _flush_when_due(self, stage: Stage) -> None:
        """Losses are read from a GPU every few steps only, so that it need not wait; on the CPU at every step."""
        if self.device == "cpu" or self.step % self.configuration.training.log_every == 0:
            row = self._flush()
            stage.note(f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s" if row else "")

    def _flush(self) -> dict[str, Any] | None:
        """Write the pending steps' rows; RunError for the first loss that is no number."""
        if not self._pending:
            return None
        losses = torch.stack([loss for _, _, loss, _ in self._pending]).float().tolist()
        norms = torch.stack([norm for *_, norm in self._pending]).float().tolist()
        now = time.monotonic()
        each = (now - self._flushed) / len(self._pending)
        rate = self.configuration.tokens_per_step / max(each, 1e-9)
        peak = accounting.peak_flops(self.device, self.configuration.training.precision)
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
        self.log.append("divergence", step, lr=lr, loss=str(loss), gradient_norm=str(norm))
        self.log.flush(sync=True)
        steps = self.checkpoints.steps()
        kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint was written before"
        raise RunError(
            f"training diverged at step {step}: loss {loss}, gradient norm {norm}, learning rate {lr:.2e}; {kept}. "
            f"Lower optimizer.lr, lengthen schedule.warmup_steps, or lower optimizer.max_gradient_norm"
        )

    def _save(self) -> None:
        self.log.flush(sync=True)
        self.checkpoints.save(
            self.step,
            self.model,
            self.optimizer,
            {
                "format": FORMAT,
                "step": self.step,
                "configuration": self.configuration.to_dict(),
                "components": self.components.fingerprints,
                "tokenizer": self.data.tokenizer.fingerprint,
                "sampler": self.sampler.state,
                "seconds": self._seconds(),
                "threads": torch.get_num_threads(),
                "best": self.best,
            },
        )
        # Writing a checkpoint is not training: it must not lower the next steps' rate.
        self._flushed = time.monotonic()

    def _resume(self) -> None:
        """Record the run, or continue it where the last checkpoint is, after checking that it is the same run."""
        steps = self.checkpoints.steps()
        if steps:
            state = self.checkpoints.state(steps[-1])
            check_same_run(state, self.configuration, self.components, self.data.tokenizer, self.folder)
            self.checkpoints.load(steps[-1], self.model, self.optimizer)
            self.step, self._seconds_before = state["step"], state["seconds"]
            self.sampler.state = state["sampler"]
            self.best = tuple(state["best"]) if state["best"] else None
            if self.device == "cpu":
                torch.set_num_threads(state["threads"])
            self.progress.say(f"continuing from step {self.step} of {self.configuration.training.steps}")
        self._known = [row for row in self.folder.metrics() if row["step"] <= self.step] if steps else []
        self.folder.write_record(
            configuration=self.configuration.to_dict(),
            decisions={**self.data.tokenizer.metadata.get("decisions", {}), **self.components.decisions},
            device=self.device,
            corpus=self.data.corpus.to_dict(),
            tokenizer=self.data.tokenizer_facts(),
            baselines=self.data.baselines,
            accounting={
                "parameters": self.accounting.parameters,
                "matmul_parameters": self.accounting.matmul_parameters,
                "flops_per_token": self.accounting.flops_per_token,
            },
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.configuration.training.precision == "bfloat16")

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._start
