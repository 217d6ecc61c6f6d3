"""Decoded inner chunks kept in memory, the least recently used dropped first."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from pipeline.store.shard import Bytes

Key = tuple[str, str, int]


class ChunkCache:
    """Bytes of decoded chunks under (split, array, number), up to ``limit`` bytes.

    Threads may share it: a chunk that one thread loads, others wait for.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._chunks: OrderedDict[Key, Future[Bytes]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(
        self, keys: Sequence[Key], load: Callable[[Sequence[Key]], Sequence[Bytes]]
    ) -> list[Bytes]:
        """Chunks under ``keys``; those not here come from one call of ``load``."""
        found: list[Future[Bytes]] = []
        mine: dict[Key, Future[Bytes]] = {}
        with self._lock:
            for key in keys:
                chunk = self._chunks.get(key)
                if chunk is None:
                    chunk = self._chunks[key] = mine[key] = Future()
                else:
                    self._chunks.move_to_end(key)
                found.append(chunk)
        if mine:
            self._load(mine, load)
        return [chunk.result() for chunk in found]

    def _load(
        self,
        mine: dict[Key, Future[Bytes]],
        load: Callable[[Sequence[Key]], Sequence[Bytes]],
    ) -> None:
        try:
            loaded = load(list(mine))
        except BaseException as error:
            with self._lock:
                for key in mine:
                    del self._chunks[key]
            for chunk in mine.values():
                chunk.set_exception(error)
            raise
        for chunk, content in zip(mine.values(), loaded, strict=True):
            chunk.set_result(content)
        with self._lock:
            self._bytes += sum(content.nbytes for content in loaded)
            self._make_room()

    def _make_room(self) -> None:
        for key in list(self._chunks):
            if self._bytes <= self.limit:
                return
            if self._chunks[key].done():
                self._bytes -= self._chunks.pop(key).result().nbytes
