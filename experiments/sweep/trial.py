"""The process of a trial: `metalearn`, which stops and saves when the sweep's process is gone.

The standard input of a trial is a pipe from the sweep, into which nothing is written. Its end means
that the sweep has ended, however it did: SIGKILL included.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from metalearn.experiments.main import main


def _stop_with_the_sweep() -> None:
    os.read(0, 1)  # returns when the other end is closed
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_with_the_sweep, daemon=True).start()
    sys.exit(main(sys.argv))
