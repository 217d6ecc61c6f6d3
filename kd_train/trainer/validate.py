"""Validation of a run: its split in storage order, shared out to the processes."""

from contextlib import closing

import torch

from kd_train.config.train_config import TrainConfig
from kd_train.distributed import World
from kd_train.evaluation.evaluate import Evaluation, evaluate
from kd_train.loader.data import CachedSamples
from kd_train.loader.prefetch import pin_batches, prefetch
from kd_train.loader.sampler import ordered_batches, ordered_within
from kd_train.trainer.numerics import matmul_precision
from pipeline.models.network import Network
from pipeline.models.normalizer import Normalizer
from pipeline.native.library import native_kernels


class Validator:
    """Evaluates students on one split, always in float32.

    A batch holds twice the samples or atoms of one in training.
    """

    def __init__(
        self,
        config: TrainConfig,
        samples: CachedSamples,
        normalizer: Normalizer,
        device: torch.device,
        world: World,
    ) -> None:
        self.samples = samples
        self._config = config
        self._normalizer = normalizer
        self.device = device
        self.world = world

    def __call__(self, student: Network) -> Evaluation:
        """Return metrics, loss and predictions, the same in all processes."""
        config, samples, world = self._config, self.samples, self.world
        if config.batch_atoms is None:
            batches = ordered_batches(len(samples), 2 * config.batch_size)
        else:
            batches = ordered_within(samples.split.n_atoms, 2 * config.batch_atoms)
        stream = prefetch(
            pin_batches(samples.batch, self.device),
            batches[world.rank :: world.size],
            threads=config.loader_threads,
        )
        native = native_kernels(config.native_kernels)
        with closing(stream), matmul_precision("float32"), native:
            return evaluate(
                student, stream, self._normalizer, config.loss, self.device, world
            )
