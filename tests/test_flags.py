"""Words that launches count in: whose they are, and that they are nobody else's."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from threading import Barrier, BrokenBarrierError, Thread
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora.kernels import flags

SECONDS_FOR_ANOTHER_THREAD = 0.2


class Meeting:
    """Words at which two threads meet that give some away at once."""

    def __init__(self, size: int) -> None:
        self.words, self.barrier = torch.zeros(size, dtype=torch.int32), Barrier(2)

    def __len__(self) -> int:
        with suppress(BrokenBarrierError):
            self.barrier.wait(SECONDS_FOR_ANOTHER_THREAD)
        return len(self.words)

    def __getitem__(self, place: slice) -> torch.Tensor:
        return self.words[place]


def at_once(*calls: Any) -> list[Any]:
    """What they return, each on a thread of its own."""
    results: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        results[number] = calls[number]()

    threads = [Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    low, high = sorted((one, other), key=torch.Tensor.data_ptr)
    return low.data_ptr() + low.nbytes > high.data_ptr()


@pytest.mark.parametrize("what", ["two streams", "two captures"])
def test_two_threads_are_not_given_the_same_words(what: str) -> None:
    pool = flags._Pool(Meeting(4096))  # type: ignore[arg-type]
    if what == "two streams":
        given = at_once(lambda: pool.shared(7), lambda: pool.shared(8))
    else:
        given = at_once(*[lambda: pool.take(9)] * 2)
    assert not overlap(*given)


def test_two_threads_on_one_stream_share_its_words() -> None:
    pool = flags._Pool(Meeting(4096))  # type: ignore[arg-type]
    one, other = at_once(*[lambda: pool.shared(7)] * 2)
    assert one is other is pool.shared(7)


def test_a_pool_gives_no_more_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = flags._Pool(torch.zeros(2100, dtype=torch.int32))
    first, second = pool.shared(1), pool.shared(2)
    assert first is not None and second is not None and not overlap(first, second)
    assert pool.shared(3) is None and pool.shared(1) is first
    last = pool.take(50)
    assert last is not None and not overlap(last, second) and pool.take(1) is None
    monkeypatch.setattr(flags, "_MOST_STREAMS", 1)
    few = flags._Pool(torch.zeros(4096, dtype=torch.int32))
    assert few.shared(1) is not None and few.shared(2) is None


def test_a_pool_is_made_on_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What redirects a thread's allocations, as torch.compile's CUDA graphs do and modes such as this one can."""
    seen: list[Any] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    synchronized: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    monkeypatch.setattr(flags, "_POOL_WORDS", 2048)
    device = torch.device("cpu")
    with Watching(), torch.inference_mode():
        pool = flags._new_pool(device)
    assert not seen and synchronized == [device]
    assert pool.words.dtype == torch.int32 and len(pool.words) == 2048 and not pool.words.any()
    assert not pool.words.is_inference()


COLD = """
import torch, fused_lora
torch.manual_seed(0)
layer = fused_lora.Linear(4096, 1024, r=16, merge_weights=False, device="cuda", dtype=torch.bfloat16).eval()
torch.nn.init.normal_(layer.lora_B)
compiled = torch.compile(layer, mode="reduce-overhead", dynamic=False)
with torch.no_grad(), fused_lora.use_backend("decode"):
    for rows in (8, 8, 8, 64, 64, 64, 8):
        x = torch.randn(rows, 4096, device="cuda").bfloat16()
        y = compiled(x).clone()
        assert torch.equal(y, layer(x)), rows
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
def test_the_first_launch_of_a_process_may_be_one_of_torch_compiles_graphs() -> None:
    run = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
