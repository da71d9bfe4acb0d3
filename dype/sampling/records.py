"""Save an image with its record: a PNG that contains the settings, and the same record as JSON."""

import io
import json
import os
import tempfile
import warnings
from pathlib import Path

from PIL import Image, PngImagePlugin

from dype.sampling import images

PNG_CHUNK = "dype"  # name of the PNG's text chunk
MAX_PIXELS = 16384**2  # of the largest image that this program generates
# what Pillow raises for a broken image beside OSError
BROKEN_IMAGE_ERRORS = (ValueError, SyntaxError, RuntimeError, LookupError, TypeError, EOFError)


def check_writable(folder: Path) -> None:
    """Create a folder and write to it; raise an OSError that names --output_dir if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}; try --output_dir") from error


def next_free_path(path: Path) -> Path:
    """Return `path`, or the first of PATH_2, PATH_3, ... that has neither an image nor a record."""
    count, free = 1, path
    while free.exists() or free.with_suffix(".json").exists():
        count += 1
        free = path.with_stem(f"{path.stem}_{count}")
    return free


def save_image(image: Image.Image, record: dict | None, path: Path) -> None:
    """Write PATH.json, then PATH.png, so that an image always has its record. Raises OSError.

    Args:
        image: any size.
        record: None writes neither the JSON nor text in the PNG, and deletes an earlier JSON.
        path: of the PNG.
    """
    info, contents = PngImagePlugin.PngInfo(), {}
    if record is not None:
        contents[path.with_suffix(".json")] = to_json(record)
        info.add_itxt(PNG_CHUNK, to_json(record).decode())
    png = io.BytesIO()
    image.save(png, "png", pnginfo=info)
    write_atomically(contents | {path: png.getvalue()})
    if record is None:
        path.with_suffix(".json").unlink(missing_ok=True)


def to_json(record: dict) -> bytes:
    """Encode a record as JSON."""
    return json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n"


def write_atomically(contents: dict[Path, bytes]) -> None:
    """Write files of one folder, each completely or not at all.

    Raises OSError after deleting those files of `contents` that did not exist before.
    """
    temporary = {path: path.parent / f".{path.name}.{os.getpid()}.part" for path in contents}
    new = [target for target in contents if not target.exists()]
    try:
        for target, part in temporary.items():
            with part.open("wb") as file:
                file.write(contents[target])
                file.flush()
                os.fsync(file.fileno())
        for target, part in temporary.items():
            part.replace(target)
    except OSError as error:
        for target in new:
            target.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {target}: {error.strerror}; free some space, or use another folder"
        ) from error
    finally:
        for part in temporary.values():
            part.unlink(missing_ok=True)


def read_record(path: str | Path) -> dict:
    """Read the record in a PNG. Raises ValueError if it has none, OSError if it cannot be read."""
    try:
        # Image.open refuses large images, so the PNG is opened by its class.
        with Path(path).open("rb") as file, PngImagePlugin.PngImageFile(file) as image:
            text = image.info.get(PNG_CHUNK)
    except SyntaxError as error:
        raise ValueError("it is not a PNG image") from error
    if text is None:
        raise ValueError("it carries no settings of this program")
    return parse_json(text)


def parse_json(text: str | bytes) -> dict:
    """Decode a record. Raises ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("its settings are not JSON") from error


def find_record(path: Path) -> tuple[dict, Path]:
    """Return the record of an image and the file that holds it.

    The file is the PNG itself, or the JSON beside a copy in another format or without text chunks.
    `path` may also be the JSON. Raises ValueError if there is no record, OSError.
    """
    if path.suffix.lower() == ".json":
        return parse_json(path.read_bytes()), path
    try:
        return read_record(path), path
    except ValueError as error:
        beside = path.with_suffix(".json")
        if not beside.is_file():
            raise ValueError(
                f"{error}, and there is no {beside.name} beside it; expected an image of this "
                "program as it was saved, or its .json"
            ) from error
    return parse_json(beside.read_bytes()), beside


def read_png_size(path: Path) -> tuple[int, int]:
    """Return width and height of a PNG. Raises ValueError for another format, OSError."""
    try:
        with path.open("rb") as file, PngImagePlugin.PngImageFile(file) as image:
            return image.size
    except SyntaxError as error:
        raise ValueError("it is not a PNG image") from error


def read_png(path: Path) -> Image.Image:
    """Read an image of this program in RGB, whatever its size. Raises OSError."""
    try:
        with path.open("rb") as file, PngImagePlugin.PngImageFile(file) as image:
            return image.convert("RGB")
    except (ValueError, SyntaxError) as error:
        raise OSError(str(error)) from error


def open_image(path: str | Path) -> Image.Image:
    """Read an image of any format and of up to `MAX_PIXELS`, as `images.decode` does.

    Raises OSError, with the reason if there is no `strerror`.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above it, and raises above twice
        with warnings.catch_warnings(action="ignore"):  # of large images, and before errors
            return images.decode(path)
    except Image.UnidentifiedImageError as error:
        raise OSError("it is no image of a format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise OSError(f"it has more than {MAX_PIXELS} pixels") from error
    except BROKEN_IMAGE_ERRORS as error:
        raise OSError(" ".join(str(error).split()) or "it is broken") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
