"""Landscapes: what is in them, their captions, and which combinations training leaves out.

One sun (a moon at night) stands in a sky above mountains and a lake, a meadow or a desert.
`dype.demo.drawing` draws them.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product

import numpy as np

# time -> colors of the sky at the top, in the middle, at the horizon, and of the light on land
TIMES = {
    "dawn": ((88, 116, 192), (176, 170, 204), (255, 208, 172), (1.0, 0.9, 0.84)),
    "noon": ((44, 112, 210), (112, 174, 234), (204, 232, 248), (1.0, 1.0, 1.0)),
    "dusk": ((44, 36, 96), (132, 66, 112), (252, 142, 82), (0.82, 0.62, 0.62)),
    "night": ((6, 10, 36), (20, 32, 74), (54, 76, 128), (0.4, 0.46, 0.62)),
}
SUNS = {
    "red": (232, 52, 40),
    "orange": (252, 146, 40),
    "yellow": (255, 226, 90),
    "white": (252, 252, 248),
}
HILLS = {"green": (58, 124, 60), "blue": (58, 92, 158), "purple": (116, 70, 144),
         "brown": (140, 94, 58)}  # fmt: skip
GROUNDS = {"lake": (30, 52, 84), "meadow": (112, 158, 62), "desert": (222, 180, 112)}
COVERS = ("bare", "snowy", "forested")
HEIGHTS = {"low": (0.25, 0.27), "high": (0.13, 0.16)}  # of the sun's center, from the top
SKIES = ("clear", "cloudy")
EXTRAS = ("", "pines", "birds")

ATTRIBUTES = {"time": TIMES, "color": SUNS, "hills": HILLS, "ground": GROUNDS, "cover": COVERS,
              "height": HEIGHTS, "sky": SKIES, "extra": EXTRAS}  # fmt: skip
COMBINATIONS = tuple(product(TIMES, SUNS, HILLS, GROUNDS))
HELD_OUT = tuple(
    COMBINATIONS[i]
    for i in np.random.default_rng(2510_20766).choice(len(COMBINATIONS), 29, replace=False)
)
TRAINED = tuple(combination for combination in COMBINATIONS if combination not in HELD_OUT)


@dataclass(frozen=True)
class Scene:
    """Content of an image; lengths in units of its sides, origin at the top left."""

    time: str
    color: str  # of the sun
    hills: str  # color of the mountains
    ground: str
    cover: str  # of the mountains
    height: str  # of the sun
    sky: str
    extra: str
    x: float  # center of the sun
    y: float
    radius: float
    horizon: float
    seed: int  # of everything else

    @property
    def caption(self) -> str:
        """Return the prompt of the scene."""
        return self.caption_without(())

    def caption_without(self, left_out: Collection[str]) -> str:
        """Return the prompt without some of ATTRIBUTES."""
        words = {name: "" if name in left_out else getattr(self, name) for name in ATTRIBUTES}
        sun = "moon" if self.time == "night" else "sun"
        parts = ["a {height} {color}", sun, "over {cover} {hills} mountains"]
        optional = {"ground": "and a {ground}", "time": "at {time}", "sky": "under a {sky} sky",
                    "extra": "with {extra}"}  # fmt: skip
        parts += [part for name, part in optional.items() if words[name]]
        return " ".join(" ".join(parts).format(**words).split())


def caption_pattern() -> re.Pattern:
    """Return the pattern of captions; its groups are the attributes, and "sun" for sun or moon."""
    time, color, hills, ground, cover, height, sky, extra = (
        f"(?P<{name}>{'|'.join(word for word in words if word)})"
        for name, words in ATTRIBUTES.items()
    )
    return re.compile(
        f"an? ({height} )?({color} )?(?P<sun>sun|moon) over ({cover} )?({hills} )?mountains"
        f"( and a {ground})?( at {time})?( under a {sky} sky)?( with {extra})?"
    )


CAPTION = caption_pattern()


def parse_caption(caption: str) -> dict[str, str]:
    """Return the ATTRIBUTES of a caption, "" for those that it leaves out; a moon says night.

    Raises:
        ValueError: the text is not a caption of a scene, whole or in part.
    """
    match = CAPTION.fullmatch(caption)
    if match:
        words = match.groupdict(default="")
        is_moon = words.pop("sun") == "moon"
        words["time"] = words["time"] or "night" * is_moon
        if is_moon == (words["time"] == "night"):
            return words
    raise ValueError(f"{caption!r} is not a caption of the demo model")


def sample_scene(rng: np.random.Generator, combinations=COMBINATIONS) -> Scene:
    """Draw a scene whose (time, color, hills, ground) is one of `combinations`."""
    combination = combinations[rng.integers(len(combinations))]
    cover, height, sky, extra = (
        str(rng.choice(list(words))) for words in (COVERS, HEIGHTS, SKIES, EXTRAS)
    )
    if combination[0] == "night" and extra == "birds":
        extra = ""
    x, y = rng.uniform(0.34, 0.66), rng.uniform(*HEIGHTS[height])
    radius, horizon = rng.uniform(0.065, 0.085), rng.uniform(0.62, 0.66)
    seed = int(rng.integers(2**31))
    return Scene(*combination, cover, height, sky, extra, x, y, radius, horizon, seed)
