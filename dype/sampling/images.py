"""Read images of any source as a viewer shows them: upright, in 8-bit sRGB, on white."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF
WHITE_IS_ZERO, SIGNED = 0, (2,)  # values of the last two
# layout of a PNG -> factor by which Pillow multiplies pixels, but not the color that is transparent
SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
# color space of an ICC profile -> the modes of images that it can describe, its own first
PROFILE_MODES = {"RGB": ("RGB", "L", "P", "1", "YCbCr"), "GRAY": ("L", "1"), "CMYK": ("CMYK",)}
SRGB_TOLERANCE = 0.5  # levels; a profile that changes colors by less, on average, is sRGB


def decode(path: str | Path) -> Image.Image:
    """Read an image in RGB as a viewer shows it, with its transparent parts on white.

    Raises ValueError for values or a color profile without a meaning, and Pillow's errors.
    """
    # Pillow maps a file that it opens by name, and then garbles TIFFs on their side.
    with Path(path).open("rb") as file, Image.open(file) as image:
        tags = dict(getattr(image, "tag_v2", {}))
        color = image.info.get("transparency")
        for layout, scale in SCALES.items():
            if color is not None and f"'{layout}'" in str(image.tile):
                color = np.multiply(color, scale).astype(int).tolist()
                image.info["transparency"] = tuple(color) if isinstance(color, list) else color
        image = ImageOps.exif_transpose(image)
    profile, alpha = image.info.get("icc_profile"), None
    if image.has_transparency_data:
        image, alpha = split_alpha(image)
    if image.mode[0] in "IF":
        image = reduce_depth(image, tags)
    if profile and image.mode != "LAB":
        image = convert_profile(image, profile)
    image = image.convert("RGB")
    if alpha is not None:
        ground = Image.new("RGB", image.size, "white")
        ground.paste(image, mask=alpha)
        image = ground
    return image


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Return the colors of an image with transparency, and its opacity in mode L."""
    if image.mode[0] == "I":
        opaque = np.asarray(image) != image.info["transparency"]
        return image, Image.fromarray(opaque.astype(np.uint8) * 255)
    rgba = image.convert("RGBA")
    is_gray = image.mode in ("1", "L", "LA")  # because its profile may be one of grays
    return image.getchannel(0) if is_gray else rgba.convert("RGB"), rgba.getchannel("A")


def reduce_depth(image: Image.Image, tags: dict) -> Image.Image:
    """Reduce an image of modes I;16, I or F to 8 bits: 16-bit values to their high byte.

    White of 32-bit values follows from the largest value: 1 (of fractions), 255 or 65535.

    Args:
        image: image with one channel.
        tags: tags of a TIFF, by number; {} for other formats.

    Raises:
        ValueError: the values fit no such white.
    """
    values = np.asarray(image)
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0] - (tags.get(SAMPLE_FORMAT) == SIGNED)
    levels = [2**bits - 1] if image.mode[0] == "I" and bits <= 16 else [255, 65535]
    levels = [1, *levels] if image.mode == "F" else levels
    low, high = values.min(), values.max()
    # because the white of a largest value of 3, for example, is unclear
    ranges = [(16 * below, level) for below, level in zip((0, *levels), levels, strict=False)]
    white = next((level for dark, level in ranges if low >= 0 and dark <= high <= level), None)
    if white is None:
        raise ValueError(
            f"its values go from {low:g} to {high:g}, expected 0 to {' or '.join(map(str, levels))}"
        )
    if image.mode == "F":
        values = np.rint(values * (255 / white))
    else:
        values = values.astype(np.uint32) * 256 // (white + 1)
    values = values.astype(np.uint8)
    return Image.fromarray(255 - values if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else values)


def convert_profile(image: Image.Image, data: bytes) -> Image.Image:
    """Convert an image from its ICC profile to sRGB. Raises ValueError for an unusable profile."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = profile.profile.xcolor_space.strip()
        modes = PROFILE_MODES.get(space, ())
        if image.mode not in modes:
            raise ValueError(f"it is for {space}, the image is {image.mode}")
        transform = ImageCms.buildTransform(
            profile, ImageCms.createProfile("sRGB"), modes[0], "RGB"
        )
    except (OSError, ValueError, ImportError, ImageCms.PyCMSError) as error:
        raise ValueError(
            f"its color profile cannot be used ({error}); save it in sRGB, or without a profile"
        ) from error
    image = image.convert(modes[0])
    return (
        image if changes_little(transform, modes[0]) else ImageCms.applyTransform(image, transform)
    )


def changes_little(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a transform to sRGB changes colors by less than `SRGB_TOLERANCE` on average.

    So images in sRGB keep their pixels, although its profiles differ in their last digits.
    """
    axis = np.arange(0, 256, 1 if mode == "L" else 17, dtype=np.uint8)
    if mode == "CMYK":
        return False
    colors = axis if mode == "L" else np.stack(np.meshgrid(axis, axis, axis), -1).reshape(-1, 3)
    probe = Image.fromarray(colors[None])
    before, after = (
        np.asarray(version.convert("RGB"), int)
        for version in (probe, ImageCms.applyTransform(probe, transform))
    )
    return bool(np.abs(after - before).mean() < SRGB_TOLERANCE)
