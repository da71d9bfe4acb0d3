"""Save an image with its record: a file that contains the settings, and the same record as JSON.

A PNG has the record in a text chunk. JPEG and WebP have it in their EXIF, as the comment of the
user, and the prompt as the description, which viewers show.
"""

import errno
import hashlib
import io
import json
import os
import struct
import tempfile
import warnings
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

PNG_CHUNK = "dype"  # name of the PNG's text chunk
# ending of a file's name -> how Pillow saves it; JPEG with full colors, WebP without loss
JPEG = {"format": "jpeg", "quality": 95, "subsampling": 0}
FORMATS = {".png": {"format": "png"}, ".jpg": JPEG, ".jpeg": JPEG}
FORMATS[".webp"] = {"format": "webp", "lossless": True, "method": 1}
IMAGE_CLASSES = {  # by the first bytes of a file
    b"\x89PNG": PngImagePlugin.PngImageFile,
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
}
EXIF_ASCII = b"ASCII\0\0\0"  # begins a comment of this encoding
MAX_EXIF = 65_000  # bytes in a JPEG, with some to spare for its tags
MAX_DESCRIPTION = 4000  # bytes of a prompt; the record has all of it
MAX_TEMPORARY_NAME = 100  # bytes, without the process; file systems take 143 or more
# errors of a file system for a name that it cannot have
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
MAX_PIXELS = 16384**2  # of the largest image that this program generates
# what Pillow raises for a broken image beside OSError
BROKEN_IMAGE_ERRORS = (ValueError, SyntaxError, RuntimeError, LookupError, TypeError, EOFError)


def check_writable(folder: Path, name: str = "image.png") -> None:
    """Create a folder, write to it, and check that it can have an image of this name.

    Raises OSError that names --output_dir.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
        check_names(*output_files(folder / name))
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write to {folder}: {reason}; try --output_dir") from error


def output_files(path: Path) -> tuple[Path, Path, Path]:
    """Return the files that `save_image` writes for an image; of two temporary ones the longer."""
    json_path = path.with_suffix(".json")
    return path, json_path, temporary_path(json_path)


def check_names(*paths: Path) -> None:
    """Raise OSError if the file system cannot have a path, whose folders need not exist."""
    for path in paths:
        folder = next((part for part in path.parents if os.path.isdir(part)), path)
        # Each name alone too, because the system looks at nothing below a missing folder.
        for candidate in (path, *(folder / name for name in path.relative_to(folder).parts)):
            try:
                os.lstat(candidate)
            except OSError as error:
                if error.errno in NAME_ERRORS:
                    raise


def next_free_path(path: Path) -> Path:
    """Return `path`, or the first of PATH_2, PATH_3, ... that has neither an image nor a record."""
    count, free = 1, path
    while free.exists() or free.with_suffix(".json").exists() or find_neighbors(free):
        count += 1
        free = path.with_stem(f"{path.stem}_{count}")
    return free


def find_neighbors(path: Path) -> list[Path]:
    """Return the images whose record would be the same JSON: names with another ending."""
    endings = [*FORMATS, *map(str.upper, FORMATS)]
    neighbors = [file for file in map(path.with_suffix, endings) if file != path and file.exists()]
    # because a.PNG is a.png where a file system ignores case
    return [file for file in neighbors if not (path.exists() and file.samefile(path))]


def save_image(image: Image.Image, record: dict | None, path: Path, overwrite: bool = True) -> Path:
    """Write the JSON, then the image, so that an image always has its record; return the path.

    If that fails, both go to the temporary folder, because the image may have taken an hour.

    Args:
        image: image to save.
        record: its record; None writes neither the JSON nor a record in the image, and deletes an
            earlier JSON, unless it belongs to an image with another ending.
        path: file of the image; its ending is one of `FORMATS`.
        overwrite: replace existing files; False: take the next free name.

    Raises:
        OSError: `path` cannot be written; the sentence says where the image is instead.
    """
    contents = {} if record is None else {".json": to_json(record)}
    contents[path.suffix] = encode_image(image, record, path.suffix.lower())

    def write(target: Path, replace: bool) -> Path:
        target = target if replace else next_free_path(target)
        write_atomically({target.with_suffix(suffix): data for suffix, data in contents.items()})
        if record is None and not find_neighbors(target):
            target.with_suffix(".json").unlink(missing_ok=True)
        return target

    try:
        return write(path, overwrite)
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror}" if error.strerror else error
        try:
            target = write(Path(tempfile.gettempdir(), shorten_name(path.name, 200)), False)
        except OSError as second:
            raise OSError(f"{reason}; the image is lost, because {second}") from error
        raise OSError(f"{reason}; the image is in {target}") from error


def encode_image(image: Image.Image, record: dict | None, ending: str) -> bytes:
    """Return an image as a file.

    Args:
        image: the image.
        record: its record; None: none.
        ending: of the file's name, one of `FORMATS`.
    """
    file, options = io.BytesIO(), dict(FORMATS[ending])
    if record is not None and ending == ".png":
        info = options["pnginfo"] = PngImagePlugin.PngInfo()
        info.add_itxt(PNG_CHUNK, to_json(record).decode())
    elif record is not None:
        options["exif"] = to_exif(record)
    image.save(file, **options)
    return file.getvalue()


def to_exif(record: dict) -> bytes:
    """Return EXIF data with the record and the prompt; without the record if it is too long.

    Then, as with a thousand steps, the JSON beside the image alone has it.
    """
    comment, exif = EXIF_ASCII + json.dumps(record).encode(), Image.Exif()
    prompt = str(record.get("prompt", "")).encode(errors="replace")[:MAX_DESCRIPTION]
    exif[ExifTags.Base.ImageDescription] = prompt
    if len(comment) + len(prompt) <= MAX_EXIF:
        exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    return exif.tobytes()


def to_json(record: dict) -> bytes:
    """Encode a record as JSON."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    return text.encode(errors="backslashreplace") + b"\n"  # JSON's own escapes


def shorten_name(name: str, max_bytes: int) -> str:
    """Return a file name, or, if it is longer than `max_bytes`, a hash with its suffix."""
    encoded = os.fsencode(name)
    if len(encoded) <= max_bytes:
        return name
    return hashlib.sha256(encoded).hexdigest()[:12] + Path(name).suffix


def temporary_path(path: Path) -> Path:
    """Return the path under which this process writes a file, before it gets its name."""
    return path.parent / f".{shorten_name(path.name, MAX_TEMPORARY_NAME)}.{os.getpid()}.part"


def write_atomically(contents: dict[Path, bytes]) -> None:
    """Write files of one folder, each completely or not at all.

    Raises OSError after deleting those files of `contents` that did not exist before.
    """
    temporary = {path: temporary_path(path) for path in contents}
    new = []
    try:
        for target, part in temporary.items():
            new += [] if target.exists() else [target]
            with part.open("wb") as file:
                file.write(contents[target])
                file.flush()
                os.fsync(file.fileno())
        for target, part in temporary.items():
            part.replace(target)
    except OSError as error:
        delete_files(new)
        reason = error.strerror or error
        raise OSError(
            f"cannot write {target}: {reason}; free some space, or use another folder"
        ) from error
    finally:
        delete_files(temporary.values())


def delete_files(paths: Iterable[Path]) -> None:
    """Delete those files that exist and can be deleted."""
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def read_record(path: str | Path) -> dict:
    """Read the record in an image. Raises ValueError if it has none, OSError if unreadable."""
    with open_header(Path(path)) as image:
        text = image.info.get(PNG_CHUNK)
        if text is None and "exif" in image.info:
            text = read_comment(image.info["exif"])
    if text is None:
        raise ValueError("it carries no settings of this program")
    return parse_json(text)


def read_comment(data: bytes) -> bytes | None:
    """Return the comment in EXIF data that `to_exif` may have written; None if there is none."""
    exif = Image.Exif()
    try:
        with warnings.catch_warnings(action="ignore"):
            exif.load(data)
            comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except (*BROKEN_IMAGE_ERRORS, OSError, struct.error):
        return None
    is_ascii = isinstance(comment, bytes) and comment.startswith(EXIF_ASCII)
    return comment.removeprefix(EXIF_ASCII) if is_ascii else None


@contextmanager
def open_header(path: Path):
    """Open a PNG, JPEG or WebP image without its pixels. Raises ValueError for others, OSError."""
    with path.open("rb") as file:
        begin = file.read(4)
        file.seek(0)
        for signature, image_class in IMAGE_CLASSES.items():
            if begin.startswith(signature):
                try:
                    with warnings.catch_warnings(action="ignore"):  # of broken EXIF
                        image = image_class(file)  # because Image.open refuses large images
                except BROKEN_IMAGE_ERRORS as error:
                    raise ValueError("it is broken") from error
                yield image
                return
    raise ValueError("it is no PNG, JPEG or WebP image")


def parse_json(text: str | bytes) -> dict:
    """Decode a record. Raises ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("its settings are not JSON") from error


def find_record(path: Path) -> tuple[dict, Path]:
    """Return the record of an image and the file that holds it.

    The file is the image itself, or the JSON beside a copy in another format or without metadata.
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


def open_image(path: str | Path) -> Image.Image:
    """Read an image of any format and of up to `MAX_PIXELS`, as `images.decode` does.

    Raises OSError, with the reason if there is no `strerror`.
    """
    from dype.sampling import images  # here, because of numpy, which no mistake in a flag needs

    if Path(path).is_fifo():  # which can be read only once, and may never end
        raise OSError("it is a pipe, expected a file")
    with accept_large_images():
        return images.decode(path)


def read_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image of any format. Raises OSError as `open_image`."""
    with accept_large_images(), Image.open(path) as image:
        exif = image.getexif() if "exif" in image.info else {}  # a PNG without it would be decoded
        is_on_its_side = exif.get(ExifTags.Base.Orientation, 1) > 4
        return image.size[::-1] if is_on_its_side else image.size


@contextmanager
def accept_large_images():
    """Let Pillow read up to `MAX_PIXELS` in the `with` block, and raise OSError for all it raises.

    An error without `strerror` has the reason as its text.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above it, and raises above twice
        with warnings.catch_warnings(action="ignore"):  # of large images, and before errors
            yield
    except Image.UnidentifiedImageError as error:
        raise OSError("it is no image of a format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise OSError(f"it has more than {MAX_PIXELS} pixels") from error
    except BROKEN_IMAGE_ERRORS as error:
        raise OSError(" ".join(str(error).split()) or "it is broken") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
