"""The training loop, top to bottom: one store, one student, one run folder."""

import itertools
import logging
import math
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from kd_train.config.train_config import TrainConfig
from kd_train.distributed import ALONE, World
from kd_train.loader.choose_split import choose_split
from kd_train.loader.data import CachedSamples, decode_batch
from kd_train.loader.prefetch import move_to_device, pin_batches, prefetch
from kd_train.loader.sampler import (
    BatchIndex,
    SamplerConfig,
    check_budget,
    group_items,
    training_batches,
)
from kd_train.strategies.losses import Term
from kd_train.trainer.average import MovingAverage
from kd_train.trainer.checkpoint import save_checkpoint
from kd_train.trainer.labels import warn_of_training_samples
from kd_train.trainer.numerics import compile_student, determinism, training_numerics
from kd_train.trainer.objective import Objective
from kd_train.trainer.optimizer import clip_gradients, make_optimizer
from kd_train.trainer.parallel import average_gradients, keep_gradients
from kd_train.trainer.progress import TrainingState
from kd_train.trainer.records import (
    Window,
    format_short,
    progress_bar,
    write_rows,
)
from kd_train.trainer.results import save_student, write_results
from kd_train.trainer.run_folder import (
    CHECKPOINT,
    Stateful,
    checkpoint_state,
    drop_outdated_results,
    read_saved_run,
    write_header,
)
from kd_train.trainer.schedule import learning_rate
from kd_train.trainer.setup import (
    Learner,
    choose_student,
    make_learner,
    resolve_config,
    weights_digest,
)
from kd_train.trainer.validate import Validator
from kd_train.trainer.weighting import Weighting
from pipeline.errors import PipelineError
from pipeline.files.atomic import hold_lock, is_held
from pipeline.models.network import Network
from pipeline.parallel.device_choice import choose_device
from pipeline.parallel.memory import reuse_freed_memory
from pipeline.store.reader import FeatureStore

log = logging.getLogger("kd_train")


class Trainer:
    """One training run: builds everything, then trains, validates and saves.

    In each process of ``world``; the first one writes the folder.
    """

    def __init__(
        self,
        config: TrainConfig,
        store: FeatureStore,
        folder: Path | str,
        device: torch.device | str | None = None,
        world: World = ALONE,
    ) -> None:
        config = resolve_config(choose_student(config, store), store, world.size)
        self.config = config
        self.store = store
        self.folder = Path(folder)
        self.device = device = choose_device(None if device is None else str(device))
        self.world = world
        reuse_freed_memory()
        self.learner: Learner = make_learner(config, store)
        self.modules = nn.ModuleDict(
            {"student": self.learner.student, "adapters": self.learner.adapters}
        ).to(device)
        self.average = MovingAverage(self.modules, config.ema_decay)
        if config.compile:
            compile_student(self.learner.student)
        terms: list[Term] = [self.learner.supervised, *self.learner.strategies]
        self.objective = Objective(self.modules, terms, config.precision)
        self.optimizer = make_optimizer(self.modules, config.optimizer)
        self._trained = [p for p in self.modules.parameters() if p.requires_grad]
        self.weighting = Weighting(config, device)
        self.train_samples = self._samples(config.train_split, self.learner.fields)
        self.tables = self.train_samples.tables(device)
        self.val_samples = self._samples(config.val_split, ())
        self.validator = self._validator(self.val_samples)
        self.testers = [self.validator]
        if config.test_split is not None:
            parts = [self._samples(n, ()) for n in config.test_split.split("+")]
            self.testers = [self._validator(part) for part in parts]
        held_out = [tester.samples.split for tester in self.testers]
        warn_of_training_samples(
            self.train_samples.split, self.val_samples.split, held_out
        )
        if config.batch_atoms is not None:
            split = self.train_samples.split
            check_budget(split.n_atoms, split.sample_ids, config.batch_atoms)
        self.progress = TrainingState(world_size=world.size)
        self.rows: list[dict[str, Any]] = []
        self.extended_from: list[int] = []
        self._parallel = self._synchronised()

    def train(self, *, resume: bool = False, extend: bool = False) -> dict[str, Any]:
        """Train to the configured step and return the final metrics of the run.

        With ``extend`` a run that is resumed may have had fewer steps. This process
        holds the folder meanwhile.

        Raises
        ------
        SpecError
            The run to be resumed had another configuration or store or cannot be
            extended, or an operation of a deterministic run has no deterministic form.
        BusyError
            Another process trains in this folder.
        DataError, DamagedStoreError
            A sample cannot be used; names it.
        """
        free = self.world.is_first and not is_held(self.folder)
        with hold_lock(self.folder) if free else nullcontext():
            return self._train_or_resume(resume, extend)

    def _train_or_resume(self, resume: bool, extend: bool) -> dict[str, Any]:
        self.world.require_equal(str(resume), f"The files in {self.folder}")
        if resume:
            self._restore(extend)
            state = f"{self.progress} {weights_digest(self.modules)}"
            self.world.require_equal(state, f"The files in {self.folder}")
        if self.world.is_first:
            write_header(self.folder, self.header())
        with determinism(self.config.deterministic, self.device):
            if not self.progress.is_done(self.config):
                self._train()
            return self._finish()

    def _train(self) -> None:
        """Take all remaining steps."""
        config, progress = self.config, self.progress
        self.modules.train()
        self._settle()
        window = Window()
        started = time.monotonic() - progress.seconds
        stream = closing(self._training_stream())
        shown = self.world.is_first
        with progress_bar(config, progress.step, shown) as bar, stream as batches:
            for drawn in group_items(batches, config.accumulate_steps):
                losses = self.step(*(self.on_device(batch) for _, batch in drawn))
                window.add(losses, sum(batch.num_graphs for _, batch in drawn))
                last = drawn[-1][0]
                progress.step += 1
                progress.epoch, progress.offset = last.epoch, last.offset + 1
                bar.update()
                if progress.step % config.eval_every and progress.step < config.steps:
                    continue
                progress.seconds = time.monotonic() - started
                self._validate(window)
                window = Window()
                if progress.stopped_early(config):
                    log.info("stopped early at step %d", progress.step)
                    break

    def _load(self, draw: BatchIndex) -> Data:
        """Read a batch of the training stream, ready for the terms of the loss."""
        batch = self.train_samples.batch(draw.positions)
        return self._prepare(batch, (draw.epoch, draw.offset, self.world.rank))

    def _prepare(self, batch: Data, draw: tuple[int, ...]) -> Data:
        for strategy in self.learner.strategies:
            strategy.prepare(batch, draw)
        batch.prepared = True
        return batch

    def on_device(self, batch: Data) -> Data:
        """Move ``batch`` to the student's device and decode its features."""
        if not batch.get("prepared"):
            batch = self._prepare(batch, ())
        return decode_batch(
            move_to_device(batch, self.device), self.learner.fields, self.tables
        )

    def step(self, *batches: Data) -> dict[str, Tensor]:
        """Take an optimiser step on ``batches`` of all processes, as on one batch.

        Returns this process's share of the loss and of its terms, detached: summed
        over processes they are the values of the joint batch.
        """
        rate = learning_rate(self.config, self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for parameter in self._trained:
            parameter.grad = None
        with training_numerics(self.config):
            values = self._accumulate(batches)
        if self.config.optimizer.clip_norm is not None:
            clip_gradients(self._trained, self.config.optimizer.clip_norm)
        self.optimizer.step()
        self.average.update_parameters(self.modules)
        if self.weighting.needs_values:
            joint = self.world.all_sum(torch.stack(list(values.values())))
            self.weighting.note(dict(zip(values, joint, strict=True)))
        return values

    def _accumulate(self, batches: Sequence[Data]) -> dict[str, Tensor]:
        """Accumulate gradients of the joint loss, and return this process's values."""
        counts = torch.stack([self.objective.counts(batch) for batch in batches])
        counts = self.world.all_sum(counts.sum(dim=0))
        values: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            with keep_gradients(self._parallel, number < len(batches) - 1):
                totals = self._parallel(batch)
                shares = self._weighted(self.objective.values(totals, counts))
                # Gradients are averaged over processes, and are to be summed.
                (self.world.size * shares["loss"]).backward()
            for name, share in shares.items():
                values[name] = values.get(name, 0) + share.detach()
        return values

    def losses(self, batch: Data) -> dict[str, Tensor]:
        """Compute L0, all distillation terms unweighted, and the weighted sum ``loss``.

        Of ``batch`` alone, in this process alone.
        """
        counts = self.objective.counts(batch)
        return self._weighted(self.objective.values(self.objective(batch), counts))

    def _weighted(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put the weighted sum ``loss`` before ``terms``."""
        total = terms["l0"]
        for name, weight in self.weighting.weights(self.progress.step).items():
            total = total + weight * terms[name]
        return {"loss": total, **terms}

    @property
    def averaged_student(self) -> Network:
        """The student with its moving-average weights."""
        modules = cast(nn.ModuleDict, self.average.module)
        return cast(Network, modules["student"])

    def _synchronised(self) -> nn.Module:
        """Wrap the objective to average gradients if there are several processes."""
        if self.world.size == 1:
            return self.objective
        start = f"{self.header()} {weights_digest(self.modules)}"
        self.world.require_equal(start, "Store, configuration or initial weights")
        return average_gradients(self.objective)

    def _settle(self) -> None:
        """Let the exchange of gradients find its order, as it does after a first pass.

        Sums over more than two processes depend on that order, and a resumed run would
        else have another one in its first step.
        """
        if self._parallel is self.objective:
            return
        batch = self.on_device(self.train_samples.batch(np.arange(1)))
        with training_numerics(self.config):
            (0 * self._parallel(batch).sum()).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _samples(self, split: str, fields: tuple[str, ...]) -> CachedSamples:
        student = self.learner.student
        return CachedSamples(
            choose_split(self.store, split, fields),
            student.graph_rule,
            student.elements,
            fields,
        )

    def _validator(self, samples: CachedSamples) -> Validator:
        units = self.learner.normalizer
        return Validator(self.config, samples, units, self.device, self.world)

    def _training_stream(self) -> Generator[tuple[BatchIndex, Data], None, None]:
        """Prefetch batches from the current position of the run to its last step."""
        config, progress = self.config, self.progress
        split = self.train_samples.split
        rule = SamplerConfig(
            config.seed,
            config.batch_size,
            config.batch_atoms,
            self.train_samples.max_shuffle_blocks(config.shuffle_blocks),
            progress.world_size,
        )
        indices = training_batches(
            [split.block_positions(block) for block in range(split.n_blocks)],
            split.n_atoms,
            rule,
            rank=self.world.rank,
            start=(progress.epoch, progress.offset),
        )
        load = pin_batches(self._load, self.device)
        left = config.accumulate_steps * (config.steps - progress.step)
        return prefetch(
            lambda draw: (draw, load(draw)),
            itertools.islice(indices, min(left, sys.maxsize)),
            threads=config.loader_threads,
        )

    def _validate(self, window: Window) -> None:
        config, progress = self.config, self.progress
        means = window.means(self.world)
        if not math.isfinite(means["train_loss"]):
            raise PipelineError(
                f"{self.folder}: the training loss is no longer finite at step "
                f"{progress.step}; lower optimizer.lr and start again."
            )
        if not all(bool(w.isfinite().all()) for w in self.modules.parameters()):
            raise PipelineError(
                f"{self.folder}: weights are no longer finite numbers by step "
                f"{progress.step}; lower optimizer.lr or raise optimizer.eps, and "
                "start again."
            )
        result = self.validator(self.averaged_student)
        weights = self.weighting.weights(progress.step - 1)
        row = {
            "step": progress.step,
            "seconds": round(progress.seconds, 2),
            "lr": learning_rate(config, progress.step - 1),
            "samples_per_second": round(window.rate(self.world), 1),
            **means,
            **{f"weight_{name}": float(value) for name, value in weights.items()},
            "val_loss": result.loss,
            **{f"val_{name}": value for name, value in result.metrics.items()},
        }
        self.rows.append(row)
        best = progress.note(float(row[f"val_{config.monitor}"]), config.monitor)
        if not self.world.is_first:
            return
        log.info("%s", ", ".join(f"{k} {format_short(v)}" for k, v in row.items()))
        if best or config.export_weights == "last":
            save_student(
                self.folder, self.learner, self.averaged_student, self._provenance()
            )
        write_rows(self.folder / "metrics.csv", self.rows)
        state = checkpoint_state(self.header(), progress, self.rows, self._parts)
        save_checkpoint(self.folder / CHECKPOINT, state)

    def _finish(self) -> dict[str, Any]:
        """Evaluate the exported student and write the run's results."""
        self.world.barrier()
        return write_results(
            self.folder, self.config, self.store, self.progress, self.testers
        )

    def header(self) -> dict[str, Any]:
        """Return the resolved configuration and the facts that identify its inputs."""
        extended = {"extended_from": self.extended_from} if self.extended_from else {}
        return {
            "config": self.config.model_dump(mode="json"),
            "hyperparameters": self.learner.student.hyperparameters,
            "fingerprint": self.store.fingerprint,
            "initial_weights": self.learner.initial_digest,
            "processes": self.world.size,
            **extended,
        }

    def _provenance(self) -> dict[str, Any]:
        return {**self.header(), "step": self.progress.step}

    @property
    def _parts(self) -> dict[str, Stateful]:
        """Parts of training that a checkpoint stores, by key."""
        return {
            "modules": self.modules,
            "average": self.average,
            "optimizer": self.optimizer,
            "weighting": self.weighting,
        }

    def _restore(self, extend: bool) -> None:
        saved = read_saved_run(
            self.folder, self.config, self.header(), self.world.size, extend=extend
        )
        saved.restore(self._parts)
        self.progress, self.rows = saved.progress, saved.rows
        self.extended_from = saved.extended_from
        if self.world.is_first:
            log.info("resumed %s at step %d", self.folder, self.progress.step)
            drop_outdated_results(self.folder, saved)
