"""The training loop, top to bottom: one store, one student, one run folder."""

import io
import itertools
import json
import logging
import math
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch_geometric.data import Data

from kd_train.checkpoint import read_checkpoint, save_checkpoint
from kd_train.config import TrainConfig
from kd_train.data import CachedSamples, decoded
from kd_train.evaluate import Evaluation, evaluate, teacher_metrics
from kd_train.objective import Objective
from kd_train.order import (
    BatchRule,
    Draw,
    check_budget,
    grouped,
    ordered_batches,
    ordered_within,
    training_batches,
)
from kd_train.prefetch import moved, pinned, prefetch
from kd_train.records import (
    Window,
    progress_bar,
    require_same_run,
    short,
    without_nan,
    write_rows,
)
from kd_train.schedule import learning_rate
from kd_train.setup import Learner, chosen_split, make_learner, with_student
from pipeline.errors import PipelineError, SpecError
from pipeline.files import write_atomically
from pipeline.models.checkpoint import load_checkpoint, save_model
from pipeline.models.network import Network
from pipeline.store.reader import FeatureStore

log = logging.getLogger("kd_train")


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint.

    The next batch is number ``offset`` of ``epoch``, in the order of ``world_size``
    processes.
    """

    step: int = 0
    epoch: int = 0
    offset: int = 0
    world_size: int = 1
    best_loss: float = float("inf")
    seconds: float = 0.0


class Run:
    """One training run: builds everything, then trains, validates and saves."""

    def __init__(
        self,
        config: TrainConfig,
        store: FeatureStore,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.config = config = with_student(config, store)
        self.store = store
        self.folder = folder
        self.device = device
        self.learner: Learner = make_learner(config, store)
        self.modules = nn.ModuleDict(
            {"student": self.learner.student, "adapters": self.learner.adapters}
        ).to(device)
        self.objective = Objective(
            self.modules, (self.learner.supervised, *self.learner.strategies)
        )
        self.average: AveragedModel = AveragedModel(
            self.modules, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)
        )
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            [p for p in self.modules.parameters() if p.requires_grad],
            lr=options.lr,
            weight_decay=options.weight_decay,
            amsgrad=options.amsgrad,
            eps=options.eps,
            fused=True,
        )
        self.train_samples = self._samples(config.train_split, self.learner.fields)
        self.tables = self.train_samples.tables(device)
        self.val_samples = self._samples(config.val_split, ())
        if config.batch_atoms is not None:
            split = self.train_samples.split
            check_budget(split.n_atoms, split.sample_ids, config.batch_atoms)
        self.progress = Progress()
        self.rows: list[dict[str, Any]] = []

    def train(self, *, resume: bool) -> dict[str, Any]:
        """Train to the configured step and return the final metrics of the run.

        Raises
        ------
        SpecError
            The run to be resumed had another configuration or store.
        DataError, DamagedStoreError
            A sample cannot be used; names it.
        """
        if resume:
            self._restore()
        self._write_header()
        config, progress = self.config, self.progress
        window = Window()
        started = time.monotonic() - progress.seconds
        self.modules.train()
        stream = closing(self._training_stream())
        with progress_bar(config, progress.step) as bar, stream as batches:
            for drawn in grouped(batches, config.accumulate):
                losses = self.step(*(self.on_device(batch) for _, batch in drawn))
                window.add(losses, sum(batch.num_graphs for _, batch in drawn))
                progress.step += 1
                last = drawn[-1][0]
                progress.epoch, progress.offset = last.epoch, last.offset + 1
                bar.update()
                if progress.step % config.eval_every == 0:
                    progress.seconds = time.monotonic() - started
                    self._validate(window)
                    window = Window()
        if not self.rows or self.rows[-1]["step"] < progress.step:
            progress.seconds = time.monotonic() - started
            self._validate(window)
        return self._finish()

    def on_device(self, batch: Data) -> Data:
        """``batch`` where the student is, its features decoded."""
        return decoded(moved(batch, self.device), self.learner.fields, self.tables)

    def step(self, *batches: Data) -> dict[str, Tensor]:
        """One optimiser step on ``batches``, as if they were one.

        Returns the loss and its terms, detached.
        """
        rate = learning_rate(self.config, self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._accumulate(batches)
        if self.config.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(
                self.modules.parameters(), self.config.optimizer.clip_norm
            )
        self.optimizer.step()
        self.average.update_parameters(self.modules)
        return losses

    def _accumulate(self, batches: Sequence[Data]) -> dict[str, Tensor]:
        """Gradients of the joint loss of ``batches``; returns its values, detached."""
        counts = torch.stack([self.objective.counts(batch) for batch in batches])
        counts = counts.sum(dim=0)
        values: dict[str, Tensor] = {}
        for batch in batches:
            shares = self._weighted(
                self.objective.values(self.objective(batch), counts)
            )
            shares["loss"].backward()
            for name, share in shares.items():
                values[name] = values.get(name, 0) + share.detach()
        return values

    @property
    def averaged_student(self) -> Network:
        """The student with its moving-average weights."""
        modules = cast(nn.ModuleDict, self.average.module)
        return cast(Network, modules["student"])

    def losses(self, batch: Data) -> dict[str, Tensor]:
        """L0, every distillation term unweighted, and their weighted sum ``loss``."""
        counts = self.objective.counts(batch)
        return self._weighted(self.objective.values(self.objective(batch), counts))

    def _weighted(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """``terms`` behind their weighted sum ``loss``."""
        total = terms["l0"]
        for name in self.config.strategies:
            total = total + getattr(self.config.distill, name) * terms[name]
        return {"loss": total, **terms}

    def _samples(self, split: str, fields: tuple[str, ...]) -> CachedSamples:
        student = self.learner.student
        return CachedSamples(
            chosen_split(self.store, split, fields),
            student.graph_rule,
            student.elements,
            fields,
        )

    def _training_stream(self) -> Generator[tuple[Draw, Data], None, None]:
        """Batches from where the run stands to its last step, made ahead."""
        config, progress = self.config, self.progress
        split = self.train_samples.split
        rule = BatchRule(
            config.seed,
            config.batch_size,
            config.batch_atoms,
            self.train_samples.window_blocks(config.buffer_blocks),
            progress.world_size,
        )
        draws = training_batches(
            [split.block_positions(block) for block in range(split.n_blocks)],
            split.n_atoms,
            rule,
            start=(progress.epoch, progress.offset),
        )
        load = pinned(self.train_samples.batch, self.device)
        return prefetch(
            lambda draw: (draw, load(draw.positions)),
            itertools.islice(draws, config.accumulate * (config.steps - progress.step)),
            threads=config.loader_threads,
        )

    def _validate(self, window: Window) -> None:
        progress = self.progress
        means = window.means()
        if not math.isfinite(means["train_loss"]):
            raise PipelineError(
                f"{self.folder}: the loss is no longer a finite number by step "
                f"{progress.step}; lower optimizer.lr and start again."
            )
        result = self.evaluate(self.averaged_student)
        row = {
            "step": progress.step,
            "seconds": round(progress.seconds, 2),
            "lr": learning_rate(self.config, progress.step - 1),
            "samples_per_second": round(window.rate(), 1),
            **means,
            "val_loss": result.loss,
            **{f"val_{name}": value for name, value in result.metrics.items()},
        }
        self.rows.append(row)
        log.info("%s", ", ".join(f"{k} {short(v)}" for k, v in row.items()))
        if result.loss < progress.best_loss or self.config.export == "last":
            progress.best_loss = result.loss
            self._export()
        write_rows(self.folder / "metrics.csv", self.rows)
        save_checkpoint(self.folder / "last.pt", self._state())

    def evaluate(self, student: nn.Module) -> Evaluation:
        """Metrics on the validation split, in storage order; twice a step's samples."""
        config, samples = self.config, self.val_samples
        if config.batch_atoms is None:
            batches = ordered_batches(len(samples), 2 * config.batch_size)
        else:
            batches = ordered_within(samples.split.n_atoms, 2 * config.batch_atoms)
        load = pinned(samples.batch, self.device)
        with closing(prefetch(load, batches, threads=config.loader_threads)) as stream:
            return evaluate(
                student,
                stream,
                self.learner.normalizer,
                self.learner.validation,
                self.device,
            )

    def _export(self) -> None:
        """Averaged weights of the plain student, without adapters."""
        save_model(
            self.folder / "student.safetensors",
            self.learner.model_name,
            self.averaged_student,
            self.learner.normalizer,
            {**self.header(), "step": self.progress.step},
        )

    def _finish(self) -> dict[str, Any]:
        """Evaluate the exported student and write the run's results."""
        student = load_checkpoint(self.folder / "student.safetensors").model
        result = self.evaluate(student.to(self.device))
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **result.predictions)
        write_atomically(self.folder / "predictions.npz", buffer.getvalue())
        summary = {
            "student": self.config.student.preset,
            "strategy": self.config.strategy,
            "seed": self.config.seed,
            "steps": self.progress.step,
            "seconds": self.progress.seconds,
            "parameters": sum(p.numel() for p in student.parameters()),
            "fingerprint": self.store.fingerprint,
            "val_split": self.config.val_split,
            "metrics": without_nan(result.metrics),
            "teacher_metrics": without_nan(teacher_metrics(self.val_samples.split)),
        }
        text = json.dumps(summary, indent=2, sort_keys=True)
        write_atomically(self.folder / "metrics.json", text.encode() + b"\n")
        return summary

    def header(self) -> dict[str, Any]:
        """Resolved configuration and what it is applied to."""
        return {
            "config": self.config.model_dump(mode="json"),
            "hyperparameters": self.learner.student.hyperparameters,
            "fingerprint": self.store.fingerprint,
            "initial_weights": self.learner.initial_digest,
        }

    def _write_header(self) -> None:
        text = yaml.safe_dump(self.header(), sort_keys=False)
        write_atomically(self.folder / "config.yaml", text.encode())

    def _state(self) -> dict[str, Any]:
        return {
            "header": self.header(),
            "progress": vars(self.progress),
            "rows": self.rows,
            "modules": self.modules.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _restore(self) -> None:
        state = read_checkpoint(self.folder / "last.pt")
        require_same_run(state["header"], self.header(), self.folder)
        self.modules.load_state_dict(state["modules"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])
        if progress.world_size != self.progress.world_size:
            raise SpecError(
                f"{self.folder} was trained by {progress.world_size} processes, now "
                f"there are {self.progress.world_size}; the order of samples depends "
                "on it, so resume with as many or use another --out."
            )
        self.progress = progress
        self.rows = state["rows"]
        log.info("resumed %s at step %d", self.folder, self.progress.step)
