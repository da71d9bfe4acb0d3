"""Images of other programs come in as a viewer shows them, or are refused with a reason."""

import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_DEMO, run
from PIL import Image, ImageCms, TiffImagePlugin

from dype.sampling import records
from dype.sampling.settings import SIDE_LIMITS

pytestmark = pytest.mark.usefixtures("in_tmp_path")
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLORS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
CLEAR = np.full((8, 8), 0, dtype=np.uint8)
# primaries of Display P3, for the white of ICC profiles
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))


def read(path) -> np.ndarray:
    return np.asarray(records.open_image(path))


def save(pixels: np.ndarray, name: str, **options) -> str:
    Image.fromarray(pixels).save(name, **options)
    return name


def png16(
    name: str, kind: int, pixels: np.ndarray, transparent: tuple = (), depth: int = 16
) -> str:
    """Write a PNG of 16 bits, which Pillow cannot write in color.

    Args:
        name: the file.
        kind: color type of the format; 0 gray, 2 RGB, 4 gray and alpha, 6 RGBA.
        pixels: uint16 [h, w] or [h, w, channels].
        transparent: the value or color that is transparent.
        depth: bits per value; below 16, each of `pixels` has several values.
    """
    from zlib import compress, crc32

    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", crc32(tag + data))

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width * 16 // depth, height, depth, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    colors = struct.pack(f">{len(transparent)}H", *transparent)
    chunks = [(b"IHDR", header), (b"tRNS", colors), (b"IDAT", compress(rows)), (b"IEND", b"")]
    with open(name, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.writelines(chunk(tag, data) for tag, data in chunks if data or tag == b"IEND")
    return name


def icc_profile(space: bytes, tags: list) -> bytes:
    """Return an ICC profile.

    Args:
        space: of the colors, four letters.
        tags: (name, data) pairs.
    """
    white = struct.pack(">3i", 63190, 65536, 54061)
    tags = [
        (b"desc", b"desc\0\0\0\0\0\0\0\5test\0" + bytes(79)),
        (b"cprt", b"text\0\0\0\0none\0"),
        (b"wtpt", b"XYZ \0\0\0\0" + white),
        *tags,
    ]
    start, body, table = 132 + 12 * len(tags), b"", struct.pack(">I", len(tags))
    for name, data in tags:
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    connection = b"Lab " if space == b"CMYK" else b"XYZ "
    header = b"lcms\2\x40\0\0mntr" + space + connection + bytes(12) + b"acsp" + bytes(28)
    return struct.pack(">I", start + len(body)) + header + white + bytes(48) + table + body


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def rgb_profile(primaries) -> bytes:
    numbers = [struct.pack(">3i", *(round(x * 65536) for x in color)) for color in primaries]
    colorants = zip((b"rXYZ", b"gXYZ", b"bXYZ"), numbers, strict=True)
    tags = [(name, b"XYZ \0\0\0\0" + number) for name, number in colorants]
    return icc_profile(b"RGB ", tags + [(name, curve(2.2)) for name in (b"rTRC", b"gTRC", b"bTRC")])


def cmyk_profile() -> bytes:
    """Return a profile of grays: L = 1 - max(cyan, black), other inks are colorless."""
    corners = [(0 if (n & 8 or n & 1) else 255, 128, 128) for n in range(16)]
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (n % 4 == 0) for n in range(9)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4
    return icc_profile(
        b"CMYK", [(b"A2B0", lut + bytes(x for corner in corners for x in corner) + identity * 3)]
    )


def to_srgb(pixels: np.ndarray, profile: bytes) -> np.ndarray:
    """Return RGB pixels in sRGB, by another function of Pillow's."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    image = Image.fromarray(pixels)
    return np.asarray(
        ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    )


WIDE = RAMP.astype(np.uint16) * 256 + 99
DEEP = {  # file -> a function that writes the ramp into it
    "g.png": lambda name: save(WIDE, name),
    "g.tif": lambda name: save(WIDE, name),
    "big-endian.tif": lambda name: Image.fromarray(WIDE.astype(">u2")).save(name),
    "int32.tif": lambda name: save(WIDE.astype(np.int32), name),
    "int32-of-bytes.tif": lambda name: save(RAMP.astype(np.int32), name),
    "g.pgm": lambda name: Path(name).write_bytes(b"P5 16 16 65535 " + WIDE.astype(">u2").tobytes()),
    "signed.tif": lambda name: save(WIDE // 2, name, tiffinfo={TiffImagePlugin.SAMPLEFORMAT: 2}),
    "float.tif": lambda name: save(RAMP.astype(np.float32) / 255, name),
    "float-of-bytes.tif": lambda name: save(RAMP.astype(np.float32), name),
    "float-of-words.tif": lambda name: save(RAMP.astype(np.float32) * 257, name),
    "rgb.png": lambda name: png16(name, 2, np.stack([WIDE] * 3, -1)),
    "negative.tif": lambda name: save(
        65535 - WIDE, name, tiffinfo={TiffImagePlugin.PHOTOMETRIC_INTERPRETATION: 0}
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_a_ramp_of_more_than_8_bits(name):
    """All of its levels come in, in 16-bit gray and RGB, in 32-bit whole numbers and fractions."""
    DEEP[name](name)
    assert (read(name) == RAMP[..., None]).all()


VALUES = {
    "beyond white": [0.0, 300000.0],
    "a fraction above 1": [0.0, 1.3],
    "below black": [-0.5, 1.0],
    "not a number": [0.0, np.nan],
    "infinite": [0.0, np.inf],
}


@pytest.mark.parametrize("name", VALUES)
def test_values_without_a_white(name):
    save(np.array([VALUES[name]], np.float32), "a.tif")
    with pytest.raises(OSError, match="expected 0 to 1 or 255 or 65535"):
        records.open_image("a.tif")
    save(np.array([[0, 70000]], np.int32), "b.tif")
    with pytest.raises(OSError, match="from 0 to 70000, expected 0 to 255 or 65535"):
        records.open_image("b.tif")


def palette_image(gray: np.ndarray) -> Image.Image:
    image = Image.fromarray(gray)
    image.putpalette(bytes(x for level in range(256) for x in [level] * 3))
    return image


def write_transparent(kind: str) -> str:
    """Write black that is transparent on the left and opaque on the right; return the name."""
    gray = np.zeros((8, 8), np.uint8)
    gray[:, 4:] = 40
    alpha = np.where(gray, 255, 0).astype(np.uint8)
    rgba = np.stack([gray, gray, gray, alpha], -1)
    wide = gray.astype(np.uint16) * 257
    match kind:
        case "rgba.png" | "rgba.webp" | "rgba.tif":
            save(rgba, kind, **({"lossless": True} if "webp" in kind else {}))
        case "la.png":
            Image.merge("LA", [*map(Image.fromarray, (gray, alpha))]).save(kind)
        case "palette.png" | "palette.gif":
            palette_image(gray).save(kind, transparency=0)
        case "soft-palette.png":
            palette_image(gray).save(kind, transparency=bytes([0]) + bytes([255] * 255))
        case "gray-key.png":
            save(gray, kind, transparency=0)
        case "rgb-key.png":
            save(rgba[..., :3].copy(), kind, transparency=(0, 0, 0))
        case "gray16-key.png":
            png16(kind, 0, wide, (0,))
        case "rgb16-key.png":  # its low byte is not zero
            png16(kind, 2, np.stack([wide + 7] * 3, -1), (7, 7, 7))
        case "la16.png":
            png16(kind, 4, np.stack([wide, alpha.astype(np.uint16) * 257], -1))
        case "rgba16.png":
            png16(kind, 6, rgba.astype(np.uint16) * 257)
    return kind


TRANSPARENT = "rgba.png rgba.webp rgba.tif la.png palette.png palette.gif soft-palette.png "
TRANSPARENT += "gray-key.png rgb-key.png gray16-key.png rgb16-key.png la16.png rgba16.png"


@pytest.mark.parametrize("kind", TRANSPARENT.split())
def test_transparent_parts_lie_on_white(kind):
    pixels = read(write_transparent(kind))
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == 40).all()


@pytest.mark.parametrize(("depth", "row"), [(2, 0b00000000_01010101), (4, 0x0011)])
def test_a_transparent_level_of_few_bits(depth, row):
    """The level 1 is transparent."""
    black, white = np.split(read(png16("a.png", 0, np.array([[row]]), (1,), depth))[0, :, 0], 2)
    assert (black == 0).all()
    assert (white == 255).all()


def test_half_transparent_colors_mix_with_white():
    pixels = np.concatenate([COLORS, CLEAR[..., None] + 128], -1)
    mixed = (COLORS * 128.0 + 255 * 127) / 255
    assert np.abs(read(save(pixels, "a.png")) - mixed).max() <= 0.51


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_color_profiles_become_srgb(name):
    profile = rgb_profile(DISPLAY_P3)
    options = {"icc_profile": profile} | ({"lossless": True} if "webp" in name else {})
    pixels = read(save(COLORS, name, **options))
    assert (pixels == to_srgb(COLORS, profile)).all()
    assert np.abs(pixels.astype(int) - COLORS).max() > 20


def test_profiles_of_gray_and_of_cmyk():
    """They apply to gray of 8 and 16 bits, gray with alpha, and CMYK."""
    linear = icc_profile(b"GRAY", [(b"kTRC", curve(1.0))])
    expected = to_srgb(RAMP, linear)
    assert (expected[8, 0] == 188).all()
    assert (read(save(RAMP, "a.png", icc_profile=linear)) == expected).all()
    assert (read(save(RAMP.astype(np.uint16) * 257, "b.png", icc_profile=linear)) == expected).all()
    Image.fromarray(RAMP).convert("LA").save("c.png", icc_profile=linear)
    assert (read("c.png") == expected).all()
    inks = np.zeros((1, 3, 4), np.uint8)
    inks[0, 1, 0] = inks[0, 2, 1] = 255  # cyan is black in this profile, magenta is white
    Image.frombytes("CMYK", (3, 1), inks.tobytes()).save("d.tif", icc_profile=cmyk_profile())
    assert np.abs(read("d.tif")[0, :, 0] - [255.0, 0, 255]).max() < 3


def test_an_rgb_profile_of_a_gray_or_palette_image():
    profile = rgb_profile(DISPLAY_P3)
    for mode in ("L", "P"):
        image = Image.fromarray(COLORS).convert(mode)
        image.save("a.png", icc_profile=profile)
        assert (read("a.png") == to_srgb(np.array(image.convert("RGB")), profile)).all()


def test_a_profile_that_is_srgb_but_for_rounding():
    """Profiles of sRGB differ in their last digits; the pixels stay."""
    numbers = [(0.4361, 0.2225, 0.0139), (0.3857, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for name, color in zip((b"rXYZ", b"gXYZ", b"bXYZ"), numbers, strict=True):
        [start] = struct.unpack_from(">I", srgb, srgb.index(name) + 4)
        struct.pack_into(">3i", srgb, start + 8, *(round(x * 65536) for x in color))
    cube = np.mgrid[0:256:15, 0:256:15, 0:256:15].T.reshape(324, 18, 3).astype(np.uint8)
    assert (to_srgb(cube, bytes(srgb)) != cube).any()
    assert (read(save(cube, "a.png", icc_profile=bytes(srgb))) == cube).all()


def test_images_in_srgb_keep_their_pixels():
    """So does every old record of an ordinary image: its hash is of these bytes."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (read(save(COLORS, "a.png", icc_profile=srgb)) == COLORS).all()
    for mode in ("RGB", "L", "1", "P", "CMYK", "YCbCr", "LAB"):
        image = Image.fromarray(COLORS).convert(mode)
        image.save("a.jpg" if mode in ("CMYK", "YCbCr") else "a.tif", quality=90)
        with Image.open("a.jpg" if mode in ("CMYK", "YCbCr") else "a.tif") as stored:
            expected = np.asarray(stored.convert("RGB"))
        assert (read(stored.filename) == expected).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_exif_turns_the_image_upright_in_srgb(name):
    exif, profile = Image.Exif(), rgb_profile(DISPLAY_P3)
    exif[0x112] = 6
    options = {"lossless": True} if name == "a.webp" else {"quality": 100, "subsampling": 0}
    pixels = np.kron(COLORS[:4], np.ones((8, 8, 1), np.uint8))  # 32 high, 64 wide
    save(pixels, name, exif=exif, icc_profile=profile, **options)
    difference = read(name).astype(int) - to_srgb(np.rot90(pixels, -1).copy(), profile)
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("pixels", [RAMP, RAMP.astype(np.uint16) * 256], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_gray_tiff_on_its_side(pixels, compression):
    """Pillow garbles uncompressed ones that are opened by name."""
    exif = Image.Exif()
    exif[0x112] = 8
    save(pixels[:8], "a.tif", exif=exif, compression=compression)
    assert (read("a.tif")[..., 0] == np.rot90(RAMP[:8])).all()


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_the_first_frame(name):
    frames = [Image.new("RGB", (8, 8), color) for color in ("black", "red", "blue")]
    frames[0].save(name, save_all=True, append_images=frames[1:])
    assert (read(name) == 0).all()


def test_the_largest_size_of_this_program(monkeypatch):
    """Pillow's limits, which are lower, stay as they are for other code."""
    assert SIDE_LIMITS["high"] ** 2 == records.MAX_PIXELS
    for limit in (100, 200):  # Pillow raises for 256 pixels, or warns
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings(action="error"):
            assert (read(save(RAMP, "a.png"))[..., 0] == RAMP).all()
        assert limit == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(records, "MAX_PIXELS", 64)
    assert records.open_image(save(COLORS, "a.png")).size == (8, 8)
    with pytest.raises(OSError, match="it has more than 64 pixels"):
        records.open_image(save(RAMP, "b.png"))


def write_broken(name: str) -> None:
    """Write a file that cannot be read as an image."""
    profile, gray = rgb_profile(DISPLAY_P3), icc_profile(b"GRAY", [(b"kTRC", curve(1.0))])
    match name:
        case "profile cut off":
            save(COLORS, "a.png", icc_profile=profile[:200])
        case "profile of another space":
            save(COLORS, "a.png", icc_profile=gray)
        case "pipe":
            os.mkfifo("a.png")
        case "text":
            with open("a.png", "wb") as file:
                file.write(b"text")
        case _:
            cut_kind = name.partition(" ")[0]
            save(COLORS, "whole", format=cut_kind)
            with open("whole", "rb") as whole, open("a.png", "wb") as file:
                content = whole.read()
                file.write(content[: len(content) * 2 // 3])


BROKEN = ["profile cut off", "profile of another space", "text", "pipe"]
BROKEN += [f"{kind} cut off" for kind in ("PNG", "JPEG", "TIFF", "WEBP", "AVIF", "BMP", "GIF")]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_one_sentence(name, capsys):
    """The sentence names the file and the reason, before anything is loaded."""
    if name.startswith("AVIF") and "AVIF" not in Image.SAVE:
        pytest.skip("Pillow writes no AVIF here")
    write_broken(name)
    assert run(*TINY_DEMO, "--size", "64", "--init_image", "a.png", "--output", "b.png") == 2
    err = capsys.readouterr().err
    assert err.startswith("run_dype.py: --init_image a.png cannot be read: ") or "/a.png" in err
    assert err.count("\n") == 1
    assert ("profile cannot be used" in err) == name.startswith("profile")
