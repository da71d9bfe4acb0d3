"""Run the command line again and again in forked children, and kill each at a chosen event.

    python tests/interrupted.py CUES ARGUMENTS...

CUES is a JSON list of [FOLDER, EVENT, COUNT]. Each child works in FOLDER and is killed (SIGKILL) at
the COUNT-th event. A cue of [FOLDER] lets the child finish. The exit codes are printed as JSON.

EVENT is one of:
    generate                 before an image is generated
    png, json, table         half-way through writing such a file
    png_exists, json_exists  after the file has its final name
    sheets                   before the contact sheets
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
from dype.sweep import contact_sheet, results

# because both packages import lazily, and each child would import these again
LOADED = [getattr(diffusers, name) for name in ("FluxPipeline", "FluxTransformer2DModel")]
LOADED += [getattr(transformers, name) for name in ("T5EncoderModel", "CLIPTextModel")]


def die():
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


class HalfWrittenFile:
    """Wrapper of a file that writes half of the first text and then kills the process."""

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
    events_left = [count]

    def is_due() -> bool:
        events_left[0] -= 1
        return events_left[0] == 0

    if event == "generate":
        generate = sample.generate
        sample.generate = lambda *args, **kwargs: die() if is_due() else generate(*args, **kwargs)
    elif event == "sheets":
        contact_sheet.write_contact_sheets = lambda *args: die()
    elif event in ("json_exists", "png_exists"):
        ending = f".{event.removesuffix('_exists')}"
        replace = pathlib.Path.replace

        def replace_and_die(path, target):
            new_path = replace(path, target)
            if str(target).endswith(ending) and is_due():
                die()
            return new_path

        pathlib.Path.replace = replace_and_die
    else:
        open_path = pathlib.Path.open
        ending = {"png": ".png.", "json": ".json.", "table": f"{results.RESULTS}."}

        def open_and_break(path, mode="r", *args, **kwargs):
            file = open_path(path, mode, *args, **kwargs)
            is_target = ending[event] in path.name and mode == "wb"
            return HalfWrittenFile(file) if is_target and is_due() else file

        pathlib.Path.open = open_and_break


def main(cues: str, *argv: str) -> None:
    """Run one child per cue and print the exit codes."""
    codes = []
    for folder, *cue in json.loads(cues):
        child = os.fork()
        if child == 0:
            null_device = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_device, 1)
            if cue:
                set_trap(*cue)
            os.chdir(folder)
            os._exit(run_dype.main(list(argv)))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
