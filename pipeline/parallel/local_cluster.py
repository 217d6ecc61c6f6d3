"""Worker processes of this machine: started, kept alive, and killed at the end."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# Seconds after which a dead worker's place is free, and between looks for such places.
_LOST_S = 60.0
_LOOK_S = 2.0


@contextmanager
def local_workers(workers: int, threads: int = 2) -> Iterator[Any]:
    """Client of ``workers`` fresh processes that run ``threads`` tasks each.

    They are numbered from 0 on, started again when they die, and killed at the end, at
    the latest with this process. Ctrl-C in a terminal does not reach them.
    """
    import dask
    from distributed import Client, LocalCluster

    silence()
    with _block_interrupts():
        # Threads and processes inherit who may be interrupted.
        cluster = LocalCluster(
            n_workers=0,
            threads_per_worker=threads,
            processes=True,
            memory_limit=0,  # blocks are as large as they are
            dashboard_address="127.0.0.1:0",  # any free port
            silence_logs=logging.CRITICAL,
            # Deaths are counted by whoever runs the tasks.
            scheduler_kwargs={"allowed_failures": 0},
        )
    try:
        with (
            dask.config.set({"distributed.deploy.lost-worker-timeout": _LOST_S}),
            Client(cluster, set_as_default=False) as client,
        ):
            try:
                with _keep_workers(cluster, workers):
                    yield client
            finally:
                _kill(cluster)
    finally:
        cluster.close(timeout=10)


@contextmanager
def _keep_workers(cluster: Any, workers: int) -> Iterator[None]:
    """So many workers, others in place of those that did not start again.

    The cluster gives up a worker that is not back ``_LOST_S`` after it died, as on a
    busy machine, or that died again while it started; and by itself it takes no other.
    """
    over = threading.Event()

    def keep() -> None:
        while True:
            with suppress(RuntimeError):  # the cluster's loop has ended
                cluster.scale(workers)
            if over.wait(_LOOK_S):
                return

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()


def _kill(cluster: Any) -> None:
    """End worker processes at once, whatever they are at."""
    for nanny in list(cluster.workers.values()):
        nanny.close_gracefully()  # it does not start the process again
        pid = getattr(nanny, "pid", None)
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def _block_interrupts() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def silence() -> None:
    """Quieten Dask, which tells with tracebacks what is one sentence here."""
    known = [n for n in logging.root.manager.loggerDict if n.startswith("distributed.")]
    # Its configuration gives some of its loggers a level of their own.
    for name in ("distributed", "tornado.application", "asyncio", *known):
        logging.getLogger(name).setLevel(logging.CRITICAL)
