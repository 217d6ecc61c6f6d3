"""Worker processes of this machine: started, kept alive, and killed at the end."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def local_workers(workers: int, threads: int = 2) -> Iterator[Any]:
    """Client of ``workers`` fresh processes that run ``threads`` tasks each.

    They are numbered from 0 on, started again when they die, and killed at the end, at
    the latest with this process. Ctrl-C in a terminal does not reach them.
    """
    from distributed import Client, LocalCluster

    silence()
    with _interrupts_blocked():
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
        cluster.scale(workers)
        with Client(cluster, set_as_default=False) as client:
            try:
                yield client
            finally:
                _kill(cluster)
    finally:
        cluster.close(timeout=10)


def _kill(cluster: Any) -> None:
    """End worker processes at once, whatever they are at."""
    for nanny in list(cluster.workers.values()):
        nanny.close_gracefully()  # it does not start the process again
        pid = getattr(nanny, "pid", None)
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
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
