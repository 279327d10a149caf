"""The anonymous memory of a process: what it has allocated, without the pages of mapped files."""

import contextlib
import pathlib
import threading


@contextlib.contextmanager
def printed_peak():
    """Print, at the end, the most bytes of anonymous memory (Linux) that the process had."""
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(0.01):
            status = pathlib.Path("/proc/self/status").read_text().split()
            peak.append(int(status[status.index("RssAnon:") + 1]) * 1024)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    print(max(peak))
