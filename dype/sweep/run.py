"""A sweep: each of its pictures drawn once, whatever interrupts it.

A cell is finished when its picture is there: the picture carries its settings, and the JSON beside
it and its row of results.csv are made again from them where a kill lost these.
"""

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import torch

from dype import errors
from dype.pipelines.distributed import ALONE, Team
from dype.sampling import records
from dype.sampling.run import drawn, out_of_memory
from dype.sweep.cells import Cell, axes, effective, identity, key, work
from dype.sweep.results import RESULTS, append, locked, read_rows, rewrite, short


def located(cells: list[Cell], folder: Path) -> list[Cell]:
    """The cells, each at the picture that it has already, whatever another list called that."""
    names = {cell.path.name for cell in cells}
    known = {}
    for path in folder.glob("seed_*.png"):
        if path.name not in names:
            with suppress(ValueError, KeyError, TypeError):
                record = records.load(path)
                known[key(record["flags"], record["config"], record["prompt"])] = path
    found = []
    for cell in cells:
        own = key(cell.settings.flags, cell.settings.config.to_dict(), cell.prompt)
        path = cell.path if cell.path.exists() else known.get(own, cell.path)
        found.append(replace(cell, path=path))
    return found


def finished(cells: list[Cell], overwrite: bool) -> dict[Path, dict]:
    """The records of cells whose pictures are there.

    Raises ValueError if one was drawn with other settings, naming the flag; with `overwrite` it
    counts as not drawn.
    """
    found = {}
    for cell in cells:
        if not cell.path.exists():
            continue
        try:
            record = records.load(cell.path)
            before = identity(record["flags"], record["config"], record["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            if overwrite:
                continue
            raise ValueError(
                f"{cell.path} is in the way: {error}; try --overwrite, or another --output_dir"
            ) from error
        now = identity(cell.settings.flags, cell.settings.config.to_dict(), cell.prompt)
        other = [n for n in (now | before) if now.get(n) != before.get(n)]
        if other and not overwrite:
            name = other[0]
            raise ValueError(
                f"--{name} is {now.get(name)!r}, but {cell.path} was drawn with "
                f"{before.get(name)!r}, expected the same, --overwrite, or another --output_dir"
            )
        if not other:
            found[cell.path] = record
    return found


def row(cell: Cell, record: dict | None = None, error: str = "") -> dict:
    """A cell as a row of results.csv."""
    flags, config = cell.settings.flags, cell.settings.config
    own = axes(cell.settings)
    if own["dype_scale"] is None and own["dype_exponent"] is not None:
        own["dype_scale"] = config.lambda_s
    felt = effective(config.method, config.dype)
    if own["attention_scale"] is None and "attention_scale" in felt:
        own["attention_scale"] = "own"
    found = {name: flags[name] for name in ("model", "height", "width", "multipass", "seed")}
    found |= {name: "" if value is None else short(value) for name, value in own.items()}
    found |= {"file": cell.path.name, "prompt": cell.prompt, "error": error}
    found["method"] = records.method_name(config.method, config.dype)
    took = record or {"seconds": "", "peak_memory": ""}
    return found | {name: took[name] for name in ("seconds", "peak_memory")}


def reconcile(folder: Path, cells: list[Cell], found: dict[Path, dict]) -> None:
    """Make results.csv and the JSONs say what the pictures say, after a kill at any moment."""
    ours = {cell.path.name for cell in cells}
    done = {path.name for path in found}
    kept = [
        one
        for one in read_rows(folder)
        if one["file"] not in ours or (one["file"] in done and not one["error"])
    ]
    known = {one["file"] for one in kept}
    ours |= {cell.path.with_suffix(".json").name for cell in cells} | {RESULTS, "summary.txt"}
    for part in folder.glob(".*.part"):
        owner = part.name[1:].rsplit(".", 2)[0]  # .NAME.PROCESS.part
        if owner in ours or owner.startswith("comparison_"):
            part.unlink()
    for cell in cells:
        beside = cell.path.with_suffix(".json")
        if cell.path in found:
            text = records.text_of(found[cell.path])
            if not beside.exists() or beside.read_bytes() != text:
                records.write({beside: text})
            if cell.path.name not in known:
                kept.append(row(cell, found[cell.path]))
        else:
            beside.unlink(missing_ok=True)  # of a picture that is gone, or is drawn anew
    rewrite(folder, kept)


def run(
    cells: list[Cell], folder: Path, load: Callable, overwrite: bool, team: Team = ALONE
) -> int:
    """Draw what is not there yet; returns how many cells failed. Raises ValueError, OSError.

    load: the cells to be drawn -> the pipeline and the function from a text to its embeddings;
    called if there are any. A cell that fails is written down, and the rest go on. Of several
    processes each draws its share; where they draw each picture together, a failure ends the run,
    since the others would wait for this one.
    """
    with ExitStack() as open_until_done:
        places = team.agreed(lambda: prepared(cells, folder, overwrite, open_until_done))
        cells = [replace(cell, path=path) for cell, (path, _) in zip(cells, places, strict=True)]
        rest = [cell for cell, (_, done) in zip(cells, places, strict=True) if not done]
        print(f"{folder}: pictures {len(cells)}, there already {len(cells) - len(rest)}")
        mine = team.share(rest)
        first, whole = len(cells) - len(rest), f"{len(cells)}"
        if len(mine) < len(rest):
            first, whole = 0, f"{len(mine)} of this process"
        labels = [f"[{count}/{whole}]" for count in range(first + 1, first + 1 + len(mine))]
        failed = team.total(draw_all(mine, labels, folder, load, overwrite, team) if mine else 0)
        if team.main and team.count > 1:
            arrange(folder, cells)
        return failed


def arrange(folder: Path, cells: list[Cell]) -> None:
    """Put the rows of results.csv into the order of the cells, whoever drew them first."""
    place = {cell.path.name: i for i, cell in enumerate(cells)}
    rows = sorted(read_rows(folder), key=lambda one: place.get(one["file"], -1))
    rewrite(folder, rows)


def prepared(
    cells: list[Cell], folder: Path, overwrite: bool, stack: ExitStack
) -> list[tuple[Path, bool]]:
    """Make the folder's records say what its pictures say: each cell's place, and if it is done.

    The folder is locked until the stack is left. Raises ValueError, OSError.
    """
    records.check_writable(folder)
    stack.enter_context(locked(folder))
    cells = located(cells, folder)
    found = finished(cells, overwrite)
    reconcile(folder, cells, found)
    return [(cell.path, cell.path in found) for cell in cells]


def draw_all(
    mine: list[Cell], labels: list[str], folder: Path, load: Callable, overwrite: bool, team: Team
) -> int:
    """Draw this process's share of the cells; returns how many failed."""
    pipe, encode = load(mine)
    pipe.set_progress_bar_config(disable=not team.main)
    failed, start = 0, time.perf_counter()
    done, left = 0.0, sum(work(cell.settings) for cell in mine)
    for label, cell in zip(labels, mine, strict=True):
        failure = attempt(pipe, cell, encode, folder, overwrite, team)
        failed += bool(failure)
        done, left = done + work(cell.settings), left - work(cell.settings)
        seconds = (time.perf_counter() - start) * left / done
        more = f", about {span(seconds)} left" if cell is not mine[-1] else ""
        print(f"{label} {cell.path.name}  {failure or 'done'}{more}", flush=True)
    return failed


def attempt(
    pipe, cell: Cell, encode: Callable, folder: Path, overwrite: bool, team: Team = ALONE
) -> str:
    """Draw a cell and write it down; returns why it failed, or "". Raises OSError."""
    failure, record = "", None
    try:
        image, record = drawn(pipe, cell.settings, cell.prompt, encode)
        if team.together and not team.main:
            return ""
        records.save(image, cell.path, record, overwrite)
    except OSError:  # a full disk would fail every other cell too
        raise
    except Exception as error:  # whatever one setting does to a model, the others are drawn
        if team.together or errors.of_compiler(error):  # which is no cell's fault
            raise
        failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if errors.ran_out(error):
            failure = out_of_memory(pipe, cell.settings)
    if failure:  # outside of the handler, whose traceback holds on to the tensors
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    append(folder / RESULTS, row(cell, record, failure))
    return failure


def outline(cells: list[Cell], folder: Path, overwrite: bool) -> str:
    """What a sweep would draw, and about how long that takes. Raises ValueError as `run` does."""
    cells = located(cells, folder)
    found = finished(cells, overwrite)
    rest = [cell.settings for cell in cells if cell.path not in found]
    lines = [f"  {cell.path.name}{'  (there)' * (cell.path in found)}" for cell in cells]
    lines.append(f"pictures {len(cells)}, there already {len(found)}")
    done = [cell for cell in cells if cell.path in found]
    if done:
        seconds = sum(found[cell.path]["seconds"] for cell in done)
        rate = seconds / sum(work(cell.settings) for cell in done)
        lines[-1] += f"; the rest: about {span(sum(map(work, rest)) * rate)} at the pace of those"
    else:
        lines[-1] += "; how long that takes can be said once one is there"
    return "\n".join(lines)


def span(seconds: float) -> str:
    """59 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
