"""Write a page on which images are looked at and compared: `python -m dype.sweep.viewer`.

The page is one HTML file with small JPEGs in `thumbs/`. It opens from the disk, without a server
and without a network. A folder stands for its sweep, or for the images in it.
"""

import hashlib
import html
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import quote

from PIL import Image
from tqdm import tqdm

from dype.errors import Parser, UserError, raise_user_errors, run_command
from dype.pipelines.choices import GIB
from dype.sampling import records
from dype.sampling.settings import format_value, image_settings
from dype.sweep import results
from dype.sweep.results import LABELS, REPLICATES, name_own_scale, takes_several_values

PAGE, THUMBNAILS = "index.html", "thumbs"
TEMPLATE = Path(__file__).with_name("viewer.html")
GENERATOR = b'<meta name="generator" content="dype.sweep.viewer">'
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 512, 85  # px of the longer side
CONTACT_SHEET = re.compile(r"comparison_\d+x\d+(_\d+)?\.png")  # no image of a sweep
# setting -> format of its label
FORMATS = {"size": "{}", "folder": "{}", "name": "{}", "other settings": "{}"} | LABELS
SCORES = {
    "seconds": {"title": "seconds", "digits": 1},
    "peak_memory": {"title": "peak GiB", "digits": 2},
}
METRIC = {"digits": 3}
EMPTY = ("", "none")  # values that say nothing if all images have them
UNITS = {"peak_memory": GIB}
EXAMPLES = """examples:
  python -m dype.sweep.viewer outputs/sweep
  python -m dype.sweep.viewer a.png b.png --out outputs/comparison.html
"""


def write_sweep_page(rows: list[dict], folder: Path) -> Path:
    """Write the page of a sweep, `index.html`, and return its path.

    Args:
        rows: rows of results.csv, with the values of metrics.csv.
        folder: folder of the sweep.

    Raises:
        ValueError: another program's index.html is in the way.
        OSError: a file cannot be written.
    """
    return write_page([image_of_row(row, folder) for row in rows], folder / PAGE)


def image_of_row(row: dict, folder: Path) -> dict:
    """Return path, settings, scores and error of an image for `write_page`.

    Args:
        row: row of results.csv, with the values of metrics.csv.
        folder: folder of the sweep.
    """
    settings = {name: row[name] for name in LABELS} | {"size": f"{row['width']}x{row['height']}"}
    settings["other settings"] = settings.pop("settings")
    scores = {}
    if not row["error"]:
        metrics = [name for name in row if name not in results.COLUMNS]
        names = [name for name in [*SCORES, *metrics] if row[name]]
        scores = {name: float(row[name]) / UNITS.get(name, 1) for name in names}
    path = folder / row["file"]
    return {"path": path, "settings": settings, "scores": scores, "error": row["error"]}


def image_of_file(path: Path) -> dict:
    """Return path, settings, scores and error of an image for `write_page`.

    The settings are those of its record, {} without one.
    """
    settings, scores = {}, {}
    try:
        record, _ = records.find_record(path)
        values = image_settings(record)
        values["method"] = f"{'dy_' * values.pop('dype')}{values['method']}"
        name_own_scale(values)
        for name in ("height", "width"):  # the page has the size of the file
            del values[name]
        for name in ("lora", "negative_prompt", "init_image"):
            values[name] = values[name] or "none"
        values["lora"] = " ".join(record["flags"].get("lora", [])) or "none"
        settings = {k: format_value(value) for k, value in values.items() if value is not None}
        numbers = {name: record[name] for name in SCORES if record.get(name) is not None}
        scores = {name: number / UNITS.get(name, 1) for name, number in numbers.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        settings = {}
    return {"path": path, "settings": settings, "scores": scores, "error": ""}


def write_page(images: list[dict], path: Path) -> Path:
    """Write a page and its thumbnails, and return the path of the page.

    Args:
        images: dicts of `image_of_row` or `image_of_file`.
        path: HTML file.

    Raises:
        ValueError: `path` is a file of another program.
        OSError: a file cannot be written.
    """
    check_page(path)
    folder = path.parent
    names = thumbnail_names([image["path"] for image in images], folder)
    for image, name in tqdm(
        [*zip(images, names, strict=True)], "thumbnails", unit="image", disable=None, leave=False
    ):
        image["thumbnail"] = folder / THUMBNAILS / name
        if not image["error"]:
            image["error"] = write_thumbnail(image["path"], image["thumbnail"])
    data = json.dumps(page_data(images, path), ensure_ascii=True)
    data = data.replace("<", "\\u003c")  # because a prompt may contain </script>
    parts = {"@TITLE@": html.escape(page_title(path)), "@DATA@": data}
    # at once, because a title may contain the other mark
    text = re.sub("|".join(parts), lambda match: parts[match[0]], TEMPLATE.read_text("utf-8"))
    records.write_atomically({path: text.encode(errors="backslashreplace")})
    return path


def check_page(path: Path) -> None:
    """Raise ValueError if a file is in the way that is no page of this program."""
    if path.exists() and (not path.is_file() or GENERATOR not in path.read_bytes()[:2000]):
        raise ValueError(f"{path} is no page of this program; move it away")
    folder = path.parent / THUMBNAILS
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is in the way of the folder of thumbnails; move it away")


def page_title(path: Path) -> str:
    """Return the title of a page: the name of its folder, or of its file."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.basename(folder) if name == PAGE else path.stem


def thumbnail_names(paths: list[Path], folder: Path) -> list[str]:
    """Return a file name for each thumbnail: that of the image, with a hash if it is not unique.

    Args:
        paths: of the images.
        folder: of the page; an image in another folder gets a hash too.
    """
    counts = Counter(path.stem for path in paths)
    names = []
    for path in paths:
        is_beside = os.path.abspath(path.parent) == os.path.abspath(folder)
        is_unique = counts[path.stem] == 1 and is_beside
        suffix = "" if is_unique else f"-{short_id(os.path.abspath(path))}"
        names.append(records.shorten_name(f"{path.stem}{suffix}.jpg", records.MAX_TEMPORARY_NAME))
    return names


def write_thumbnail(path: Path, thumbnail: Path) -> str:
    """Write a small JPEG of an image, unless it is up to date; return "" or why it cannot be read.

    A thumbnail has the time of its image, so that it is written again if the image changes.
    Raises OSError if it cannot be written.
    """
    try:
        time = path.stat().st_mtime_ns
        if thumbnail.exists() and thumbnail.stat().st_mtime_ns == time:
            return ""
        image = records.open_image(path)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS, reducing_gap=3)
    part = records.temporary_path(thumbnail)
    try:
        thumbnail.parent.mkdir(exist_ok=True)
        image.save(part, "jpeg", quality=THUMBNAIL_QUALITY)
        os.utime(part, ns=(time, time))
        part.replace(thumbnail)
    except OSError as error:
        raise OSError(f"cannot write {thumbnail}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return ""


def page_data(images: list[dict], path: Path) -> dict:
    """Return what the script of the page reads.

    Args:
        images: dicts of `write_page`, with their thumbnails.
        path: of the page.
    """
    entries = [image_data(image, path.parent) for image in images]
    name_files(images)
    names = [*dict.fromkeys([*FORMATS, *(name for image in images for name in image["settings"])])]
    rows = [{name: image["settings"].get(name, "") for name in names} for image in images]
    formats = {name: FORMATS.get(name, f"{name} {{}}") for name in names}
    constant = {name: rows[0][name] for name in names if len({row[name] for row in rows}) == 1}
    axes = [name for name in names if takes_several_values(rows, name)]
    for entry, row in zip(entries, rows, strict=True):
        entry["values"] = {name: row[name] for name in names if row[name] and name not in constant}
    prompt = constant.pop("prompt", "")
    common = {name: value for name, value in constant.items() if value not in EMPTY}
    scores = dict.fromkeys(name for image in images for name in image["scores"])
    columns = [name for name in REPLICATES if name in axes] or axes[-1:]
    columns = ["name"] if "name" in axes else columns
    is_named = len({row["name"] for row in rows}) == len(rows)
    return {
        "title": page_title(path),
        "prompt": prompt,
        "common": common,
        "settings": [
            {"name": name, "format": formats[name], "isAxis": name in axes}
            for name in names
            if name not in constant and any(row[name] for row in rows)
        ],
        "columns": ",".join(columns),
        "rows": "none" if is_named else "",  # because then no other setting is needed
        "replicates": REPLICATES,
        "scores": [{"name": name} | SCORES.get(name, METRIC | {"title": name}) for name in scores],
        "images": entries,
    }


def name_files(images: list[dict]) -> None:
    """Set folder and name in the settings of images, where their records do not tell them apart.

    The folder is set if there are several, the name if an image has no record.
    """
    paths = [Path(os.path.abspath(image["path"])) for image in images]
    root = os.path.commonpath([path.parent for path in paths])
    has_records = all(image["settings"].get("method") for image in images)
    has_folders = len({path.parent for path in paths}) > 1
    for image, path in zip(images, paths, strict=True):
        if not has_records:
            image["settings"]["name"] = path.stem
        if has_folders:
            image["settings"]["folder"] = os.path.relpath(path.parent, root)


def image_data(image: dict, folder: Path) -> dict:
    """Return what the script of the page reads of an image, and set its size in the settings.

    Args:
        image: dict of `write_page`, with its thumbnail.
        folder: of the page.
    """
    width, height = 1, 1
    if not image["error"]:
        width, height = records.read_size(image["path"])
        image["settings"]["size"] = f"{width}x{height}"
    url = relative_url(image["path"], folder)
    return {
        "id": short_id(url),
        "name": image["path"].name,
        "file": url,
        "thumb": relative_url(image["thumbnail"], folder),
        "width": width,
        "height": height,
        "scores": image["scores"],
        "error": image["error"],
    }


def short_id(text: str) -> str:
    """Return twelve hex digits that stand for a text."""
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]


def relative_url(path: Path, folder: Path) -> str:
    """Return a path relative to the folder of the page, quoted for a browser."""
    try:
        return quote(os.fsencode(Path(os.path.relpath(path, folder)).as_posix()))
    except ValueError:  # another drive of Windows
        return path.absolute().as_uri()


def find_images(paths: list[str]) -> list[dict]:
    """Return the images of files, and of folders: those of its sweep, else those in it.

    Raises ValueError if there is no such file or no image.
    """
    images = []
    for path in paths:
        if os.path.isdir(path):
            rows = results.read_rows(Path(path))
            images += [image_of_row(row, Path(path)) for row in rows]
            images += [] if rows else map(image_of_file, list_images(Path(path)))
        elif os.path.isfile(path):
            images.append(image_of_file(Path(path)))
        else:
            raise ValueError(f"{path!r} is no file, expected an image or a folder of images")
    if not images:
        raise ValueError(f"{', '.join(paths)} has no images, expected some")
    return [*{os.path.realpath(image["path"]): image for image in images}.values()]


def list_images(folder: Path) -> list[Path]:
    """Return the images in a folder and below it, without thumbnails and contact sheets."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and THUMBNAILS not in path.relative_to(folder).parts
        and not CONTACT_SHEET.fullmatch(path.name)
    ]


def parser() -> Parser:
    """Return the parser of the command line."""
    argument_parser = Parser(
        prog="python -m dype.sweep.viewer", description=__doc__, epilog=EXAMPLES
    )
    flag = argument_parser.add_argument
    flag("paths", nargs="+", metavar="IMAGE", help="image, or folder of a sweep or of images")
    flag("--out", type=Path, metavar="FILE.html", help="page to write (default: index.html in the "
         "folder, outputs/viewer.html for several paths)")  # fmt: skip
    return argument_parser


@raise_user_errors()
def run(args) -> None:
    """Write the page and print its path. Raises UserError, OSError."""
    is_folder = len(args.paths) == 1 and os.path.isdir(args.paths[0])
    path = args.out or (Path(args.paths[0], PAGE) if is_folder else Path("outputs/viewer.html"))
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out is {path}, expected a name in .html")
    images = find_images(args.paths)
    check_page(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(images, path)
    for image in images:
        if image["error"]:
            print(f"not shown: {image['error']}")
    print(path)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Exit codes: 0, 2 for a mistake of the user, 1 for other failures.
    """
    return run_command("dype.sweep.viewer", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
