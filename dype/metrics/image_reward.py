"""ImageReward as a process of its own: its package needs an older transformers than this program.

Run by `python -m dype.metrics` as `PYTHON reward.py DEVICE [FOLDER]`; imports nothing of `dype`.
Writes a line when the model is loaded, then for each line of JSON, [picture, prompt], its score.
"""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path


def main(device: str, folder: str | None = None) -> None:
    with redirect_stdout(sys.stderr):  # the package prints
        import ImageReward

        files = {}
        if folder:
            files = {
                "name": str(Path(folder) / "ImageReward.pt"),
                "med_config": str(Path(folder) / "med_config.json"),
            }
        model = ImageReward.load(device=device, **files)
    print("ready", flush=True)
    for line in sys.stdin:
        picture, prompt = json.loads(line)
        with redirect_stdout(sys.stderr):
            value = model.score(prompt, picture)
        print(value, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
