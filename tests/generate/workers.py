"""Workers with which something goes wrong; light to import, as each process that holds one has to."""

import os
import signal
import time
from pathlib import Path

from dit_sparse.generate import on_ray, render
from dit_sparse.generate.group import RankGroup
from tests.processes import children

DEADLY = "a red ball 6"


class OddError(Exception):
    """Pickles and cannot be read again."""

    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


class PoisonedWorker(on_ray._Worker):
    """Fails at the prompt "bad"; the first that writes `DEADLY` is killed with half of it written.

    It leaves a file named after every process of its worker in the folder "processes".
    """

    def __init__(self, renderer):
        super().__init__(renderer)
        self._encode = self._renderer.pipe.encode_prompt
        self._renderer.pipe.encode_prompt = self._poisoned
        self._write, render.write_partial = render.write_partial, self._half
        Path("processes").mkdir(exist_ok=True)
        for process in (os.getppid(), *children(os.getppid())):
            Path("processes", str(process)).touch()

    def _poisoned(self, prompt, **options):
        if prompt == "bad":
            raise OddError("no", "luck")
        return self._encode(prompt, **options)

    def _half(self, frames, partial, **options):
        if DEADLY.replace(" ", "-") in partial.name and not Path("killed").exists():
            partial.mkdir()
            (partial / "0000.png").write_bytes(b"half")
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        self._write(frames, partial, **options)


class KillingWorker(on_ray._Worker):
    """Kills other ranks when it is asked to."""

    def whoami(self):
        return {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}

    def refuse(self):
        raise FileNotFoundError(2, "no such luck")

    def render_and_kill(self, rank, *arguments):
        """Render a clip, in whose first step the process `rank` is killed."""
        self._renderer.pipe.transformer.register_forward_pre_hook(lambda *_: os.kill(rank, signal.SIGKILL))
        return self.render(*arguments)


def refuse(renderer):
    raise OSError("no model here")


class Sleeper:
    """Is busy for as long as a test may take."""

    def __init__(self, renderer):
        pass

    def sleep(self, folder):
        for process in children(os.getppid()):
            (folder / str(process)).touch()
        time.sleep(60)


def hold_sleeping_ranks(request, folder):
    RankGroup(request, Sleeper).call("sleep", folder)
