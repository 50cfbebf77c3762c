"""A run that is killed without warning, again and again at moments drawn by a seed, against one left alone."""

import json
import random
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from training_runs import state

BATCHES = 5  # that a run needs for each of its kills to find it at work

# "write", the number of a file, and whether after it; "step", its number, and where in it; "round", its number.
Moment = tuple[str | int | float, ...]

# One process imports everything, and forks a life of the run each time: SIGKILL then ends a process like any other.
_LIVES = """
import os, signal, sys, threading, time, traceback
import accelerate, torch, torch._dynamo
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer  # what transformers else imports in every life
torch.set_num_threads(1)
Image.init()
from ldm.training import run
import ldm.emoji.pools
from ldm.training.loop import Trainer

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_at_a_write(number, after):
    # A file is written whole or not at all by its last step, the renaming.
    replace, left = os.replace, [number]
    def dying(*names):
        left[0] -= 1
        if left[0] == 0 and not after:
            die()
        replace(*names)
        if left[0] == 0:
            die()
    os.replace = dying

def die_in_a_step(number, share):
    # In the time that a step took with all that follows it, its save among it.
    step, begun = Trainer.step, []
    def timed(self):
        begun.append(time.monotonic())
        if len(begun) == number:
            threading.Timer(share * (begun[-1] - begun[-2]), die).start()
        return step(self)
    Trainer.step = timed

def die_after_a_round(number):
    # Between a training's export and whatever follows it.
    run, left = Trainer.run, [number]
    def dying(self):
        done = run(self)
        left[0] -= 1
        if left[0] == 0:
            die()
        return done
    Trainer.run = dying

def live(path, moment):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        if moment:
            kinds = {"write": die_at_a_write, "step": die_in_a_step, "round": die_after_a_round}
            kinds[moment[0]](*moment[1:])
        complete = run.train(path)
        if moment:
            die()  # it came too late, and finds the run at its end
        os._exit(0 if complete else 3)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
"""


def same_bits_after_kills(
    whole: Path, killed: Path, kills: int, head: str = "", first: Sequence[Moment] = (), last_round: str = ""
) -> dict[str, torch.Tensor]:
    """Train both config files, the second through `kills` kills; its end must be the first's, which is returned.

    Moments alternate between a file's writing and any within a step. head: more to run before the training. first:
    moments of more kills, before the others. last_round: the folder of its states, in the run's.
    """
    drawn = random.Random(f"{killed.parent.name} {kills}")
    moments: list[Moment] = [*first] + [
        ("write", drawn.randint(2, 1 + BATCHES), drawn.random() < 0.5)
        if k % 2
        else ("step", drawn.randint(2, BATCHES - 1), drawn.random())
        for k in range(kills)
    ]
    plan = f"""
        codes = [live({str(whole)!r}, None)]
        codes += [live({str(killed)!r}, moment) for moment in [*{moments!r}, None]]
        import json
        print(json.dumps(codes))
        """
    script = _LIVES + textwrap.dedent(head) + textwrap.dedent(plan)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    codes = json.loads((done.stdout.strip().splitlines() or ["null"])[-1])
    assert codes == [0, *[-9] * len(moments), 0], (moments, done.stdout, done.stderr)
    ends = [state(path.parent / "run" / last_round) for path in (whole, killed)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0]), moments
    return ends[0]
