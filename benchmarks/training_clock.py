"""When the steps of a run began and ended, in a file: both sides of a benchmark against TRL write it.

It imports nothing heavy and nothing of this project: TRL's process has it in common with ours (and a reward, if any).
"""

import atexit
import json
import time
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")  # Linux


class Clock:
    """One line a step, ``{"step", "began", "ended", "cpu"}`` in Unix and CPU seconds; at the process's end its peak.

    Args:
        path: The file, begun anew.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._path.write_text("", encoding="utf-8")
        self._steps = 0
        self._began = 0.0
        atexit.register(self._write_peak)

    def begin(self) -> None:
        """A step begins."""
        self._began = time.time()

    def end(self) -> None:
        """It is done."""
        self._steps += 1
        self._write({"step": self._steps, "began": self._began, "ended": time.time(), "cpu": time.process_time()})

    def _write_peak(self) -> None:
        # not ru_maxrss: that of a child counts its parent's memory too, up to the exec
        (line,) = (line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        self._write({"peak_mib": int(line.split()[1]) / 1024})

    def _write(self, row: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
