"""A segmented run that kills itself at a random moment: `python -m ... DIRECTORY PROGRAM SEED`.

Once the program with that number is done the process is killed within the time of a few programs,
by a thread that neither JAX nor the run knows of. Without PROGRAM the run goes on to its end, and
the digest of its last state is printed.
"""

import hashlib
import os
import random
import signal
import sys
import threading
import time

import jax

from metalearn import Replay
from metalearn.checkpoints.manager import Checkpoints
from tests.helpers.checkpoints import bits
from tests.helpers.walks import Aims, Walk, trainer_of

STEPS = 2


def killer(seed):
    time.sleep(random.Random(seed).uniform(0, 0.15))
    os.kill(os.getpid(), signal.SIGKILL)


def main(directory, program=None, seed=0):
    def asked(number):
        if program is not None and number == int(program):
            threading.Thread(target=killer, args=(seed,), daemon=True).start()
        time.sleep(0.02)  # so that the moment may be at any of the next programs

    trainer = trainer_of(Walk(), replay=Replay(states=2, host=0, disk="1MB"))
    checkpoints = Checkpoints(directory, every=1, within=1)
    options = {"key": jax.random.key(0), "progress": False, "asked_to_stop": asked}
    state = trainer.fit(Aims(), STEPS, checkpoints=checkpoints, **options)
    checkpoints.close()
    print("digest", hashlib.sha256(repr(bits(state)).encode()).hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
