"""Words of device memory that are zero before a launch, and that the launch leaves at zero.

A launch whose programs wait for one another counts in such words. They must belong to it alone while it runs: launches
on one stream follow one another and share theirs. A launch that is captured into a CUDA graph may be replayed beside
anything, so that each gets words of its own, for as long as the process lives, from a pool that is made while nothing
is captured. Where that is used up, a captured launch is given fresh words, which its graph clears at every replay.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import RLock

import torch
from torch import Tensor

from .launch import thread

_POOL_WORDS = 1 << 22
_WORDS_OF_A_STREAM = 1024
_MOST_STREAMS = 1024


@dataclass
class _Pool:
    """Of one device: the words, how many of them are given away, and those of each stream."""

    words: Tensor
    given: int = 0
    of_stream: dict[int, Tensor] = field(default_factory=dict)
    giving: RLock = field(default_factory=RLock)

    def take(self, count: int) -> Tensor | None:
        """count words for good, from a multiple of 32 bytes on; None if there are not so many left."""
        with self.giving:
            first = self.given
            if first + count > len(self.words):
                return None
            self.given += -(-count // 8) * 8
        return self.words[first : first + count]

    def shared(self, stream: int) -> Tensor | None:
        """The words of a stream; None if there are too many streams."""
        words = self.of_stream.get(stream)
        if words is not None:
            return words
        with self.giving:
            words = self.of_stream.get(stream)
            if words is None and len(self.of_stream) < _MOST_STREAMS:
                words = self.take(_WORDS_OF_A_STREAM)
                if words is not None:
                    self.of_stream[stream] = words
        return words


_pools: dict[int, _Pool] = {}


def _new_pool(device: torch.device) -> _Pool:
    """Made on a thread of its own, since what this one allocates may belong to a CUDA graph of torch.compile's."""

    def make() -> _Pool:
        words = torch.zeros(_POOL_WORDS, dtype=torch.int32, device=device)
        # Whichever stream comes next must find them zero.
        torch.cuda.synchronize(device)
        return _Pool(words)

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(make).result()


def flags_for(x: Tensor, count: int) -> Tensor:
    """At least count words, int32 and zero, for a launch on the current stream of x's device."""
    words = None
    if x.is_cuda:
        index = x.get_device()
        pool, capturing = _pools.get(index), torch._C._cuda_isCurrentStreamCapturing()
        if pool is None and not capturing:
            pool = _pools.setdefault(index, _new_pool(x.device))
        if pool is not None and capturing:
            words = pool.take(count)
        elif pool is not None and count <= _WORDS_OF_A_STREAM:
            words = pool.shared(torch._C._cuda_getCurrentRawStream(index))
    if words is None:
        words = x.new_zeros(count, dtype=torch.int32)
    if thread.recorder is not None:
        thread.recorder.took_flags(words, count)
    return words
