"""A process that looks to a sweep like a trial, and takes a tenth of a second.

It writes four evaluations, the better the nearer the learning rate is to 0.01, and goes on from
those that are there. A rate above 0.9 diverges, one below 1e-5 fails, and SIGTERM ends it as it
ends a run. One with a rate in FAKE_WAITS, {rate: number}, waits for SIGTERM after so many. With
FAKE_LOG_EVERY=0 it logs evaluations alone.
"""

import json
import math
import os
import pathlib
import signal
import sys
import time

EVALUATIONS = 4
PACE = float(os.environ.get("FAKE_PACE", "0.01"))  # seconds of an evaluation
LOGS = os.environ.get("FAKE_LOG_EVERY") != "0"
WAITS = json.loads(os.environ.get("FAKE_WAITS", "{}"))


def main():
    words = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
    workdir, rate = pathlib.Path(words["workdir"]), float(words["config.optimizer.learning_rate"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    if rate < 1e-5:
        print("\nmetalearn: the rate is too small.\n(--traceback shows where.)")
        return 2
    path = workdir / "metrics.jsonl"
    done = len(path.read_text().splitlines()) // (1 + LOGS) if path.exists() else 0
    for number in range(done + 1, EVALUATIONS + 1):
        time.sleep(PACE)
        loss = math.nan if rate > 0.9 else abs(math.log10(rate) + 2) + 1 / number
        rows = [{"step": number, "loss": loss, "time/seconds": number}] if LOGS else []
        rows += [{"step": number, "eval/loss": loss, "eval/loss_ci95": 0.1}]
        with path.open("a") as file:
            file.write("".join(json.dumps(row).replace("NaN", '"NaN"') + "\n" for row in rows))
        if WAITS.get(str(rate)) == number:
            time.sleep(60)
        if rate > 0.9 and number == 2:
            print("\nmetalearn: `loss` became nan.\n(--traceback shows where.)")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
