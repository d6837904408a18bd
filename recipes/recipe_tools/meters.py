"""Memory and time of what runs on a device."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from pathlib import Path

import torch


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PeakMemory:
    """Most memory above that at the start.

    Args:
        device (`torch.device`): CUDA: its allocations count, else the resident set of the process.
    """

    def __init__(self, device: torch.device):
        self._cuda, self.kind = device.type == "cuda", "resident set"
        gc.collect()
        if self._cuda:
            self.kind = "cuda allocation"
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)  # freed memory of earlier runs would hide what this one takes
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.kind = "resident set of the process"
        self._start = _resident("VmRSS")

    def read(self) -> tuple[int, str]:
        """Bytes since the start, and the kind."""
        peak = torch.cuda.max_memory_allocated() if self._cuda else _resident("VmHWM")
        return max(peak - self._start, 0), self.kind


def _resident(name: str) -> int:
    """A line of the process's status in bytes; where there is none, the high-water mark of `getrusage`."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return 1024 * int(line.split()[1])
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
