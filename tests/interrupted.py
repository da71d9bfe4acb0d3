"""Run the command line in children that are forked after the imports, and kill them on cue.

    python tests/interrupted.py CUES ARGUMENTS...

CUES is JSON, a list of [folder, event, count]: the child works in that folder, and is killed
(SIGKILL) at the count-th event of its kind; with no event it runs to its end. Prints the children's
exit codes, -9 for a kill, as JSON.
"""

import json
import os
import pathlib
import signal
import sys

import diffusers
import transformers

import run_dype
from dype.sampling import sample
from dype.sweep import results

# the lazy modules of both, so that no child imports them again
LOADED = [getattr(diffusers, name) for name in ("FluxPipeline", "FluxTransformer2DModel")]
LOADED += [getattr(transformers, name) for name in ("T5EncoderModel", "CLIPTextModel")]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Half:
    """A file that dies half way through what it is given."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def write(self, text):
        self.file.write(text[: len(text) // 2])
        self.file.flush()
        die()


def set_trap(event: str, count: int) -> None:
    """Make this process die at the count-th event."""
    left = [count]

    def reached() -> bool:
        left[0] -= 1
        return left[0] == 0

    if event == "draw":
        draw = sample.generate
        sample.generate = lambda *args, **kwargs: die() if reached() else draw(*args, **kwargs)
    elif event == "sheets":
        run_dype.contact_sheet.write_contact_sheets = lambda *args: die()
    elif event in ("json_there", "png_there"):  # one of the two files is in place
        ending = f".{event.removesuffix('_there')}"
        replace = pathlib.Path.replace

        def replaced(path, target):
            found = replace(path, target)
            if str(target).endswith(ending) and reached():
                die()
            return found

        pathlib.Path.replace = replaced
    else:
        opened = pathlib.Path.open
        ending = {"png": ".png.", "json": ".json.", "table": f"{results.RESULTS}."}

        def opening(path, mode="r", *args, **kwargs):
            file = opened(path, mode, *args, **kwargs)
            name = path.name
            return Half(file) if ending[event] in name and mode == "wb" and reached() else file

        pathlib.Path.open = opening


def main(cues: str, *argv: str) -> None:
    codes = []
    for folder, *cue in json.loads(cues):
        child = os.fork()
        if child == 0:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            if cue:
                set_trap(*cue)
            os.chdir(folder)
            os._exit(run_dype.main(list(argv)))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
