"""What a run writes: a PNG that carries its own settings, and the same settings as JSON."""

import io
import json
import os
import tempfile
from pathlib import Path

from PIL import Image, ImageOps, PngImagePlugin

PNG_CHUNK = "dype"  # the PNG's text chunk


def check_writable(folder: Path) -> None:
    """Make the folder and write to it, or raise OSError in plain words."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}; try --output_dir") from error


def next_free_path(path: Path) -> Path:
    """`path`, or where it is taken the same name with _2, _3, ... before the suffix."""
    count, free = 1, path
    while free.exists() or free.with_suffix(".json").exists():
        count += 1
        free = path.with_stem(f"{path.stem}_{count}")
    return free


def save_image(image: Image.Image, record: dict, path: Path) -> None:
    """Write PATH.json, then PATH.png: an image is never without its record. Raises OSError."""
    text = to_json(record)
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PNG_CHUNK, text.decode())
    picture = io.BytesIO()
    image.save(picture, "png", pnginfo=info)
    write_atomically({path.with_suffix(".json"): text, path: picture.getvalue()})


def to_json(record: dict) -> bytes:
    """A record as JSON."""
    return json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n"


def write_atomically(contents: dict[Path, bytes]) -> None:
    """Write files of one folder, each whole or not at all. Raises OSError, leaving no new one."""
    parts = {to: to.parent / f".{to.name}.{os.getpid()}.part" for to in contents}
    fresh = [target for target in contents if not target.exists()]
    try:
        for target, part in parts.items():
            with part.open("wb") as file:
                file.write(contents[target])
                file.flush()
                os.fsync(file.fileno())
        for target, part in parts.items():
            part.replace(target)
    except OSError as error:
        for target in fresh:
            target.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {target}: {error.strerror}; free some space, or use another folder"
        ) from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def read_record(path: str | Path) -> dict:
    """The record in a PNG. Raises ValueError if it has none, OSError if it cannot be read."""
    try:
        with Path(path).open("rb") as file, PngImagePlugin.PngImageFile(file) as image:
            text = image.info.get(PNG_CHUNK)  # not by Image.open, which refuses large images
    except SyntaxError as error:
        raise ValueError("it is not a PNG image") from error
    if text is None:
        raise ValueError("it carries no settings of this program")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError("its settings are not JSON") from error


def read_png(path: Path) -> Image.Image:
    """An image of this program, however large, in RGB. Raises OSError."""
    try:
        with path.open("rb") as file, PngImagePlugin.PngImageFile(file) as image:
            return image.convert("RGB")  # not by Image.open, which refuses large images
    except (ValueError, SyntaxError) as error:
        raise OSError(str(error)) from error


def open_image(path: str | Path) -> Image.Image:
    """Any image that Pillow reads, upright, in RGB. Raises OSError."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from error
