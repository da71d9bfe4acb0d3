"""Drawing of landscapes in resolution-free coordinates: the training data and the ground truth.

Every part is a sum of octaves down to a few pixels, so a larger drawing of a scene shows the same
picture with finer detail.
"""

import numpy as np

from dype.demo.scenes import GROUNDS, HILLS, SUNS, TIMES, Scene

FINEST = 3  # px; shortest distance of the knots of a texture
SNOW, PINE, STAR = (240, 244, 252), (22, 44, 34), (244, 244, 255)
# of the far, the middle and the near ridge: height over the horizon, its largest change, wave
# number of its first octave, and share of haze
RIDGES = (0.155, 0.08, 3, 0.58), (0.085, 0.055, 4, 0.32), (0.03, 0.032, 5, 0.1)


def smoothstep(x: np.ndarray) -> np.ndarray:
    """Return 3 x^2 - 2 x^3 of x clamped to [0, 1]."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def line(seed: tuple, size: int, lowest: int, gain: float = 0.5, smooth: bool = False):
    """Return a fractal line over [0, 1], float32 [size], about within [-1, 1].

    Args:
        seed: seed of the values.
        size: number of points.
        lowest: wave number of the first octave.
        gain: amplitude of an octave over that of the one before.
        smooth: round its corners.
    """
    x, total, octave = (np.arange(size) + 0.5) / size, np.zeros(size), 0
    while (wave_number := lowest * 2**octave) * FINEST <= size:
        values = np.random.default_rng([*seed, octave]).uniform(-1, 1, wave_number + 2)
        position = x * wave_number
        if smooth:
            position = np.floor(position) + smoothstep(position % 1)
        total += gain**octave * np.interp(position, np.arange(wave_number + 2), values)
        octave += 1
    return total.astype(np.float32)


def spline_weights(position: np.ndarray) -> np.ndarray:
    """Return the weights of a uniform cubic B-spline, float32 [points, knots]."""
    offset = position[:, None] - np.arange(int(position.max()) + 3) + 1
    distance = abs(offset)
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.maximum(2 - distance, 0) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def noise(seed: tuple, ys: np.ndarray, xs: np.ndarray, octaves: int, gain: float = 0.7):
    """Return fractal noise of deviation about 1, float32 [ys, xs].

    Args:
        seed: seed of the values.
        ys: coordinates of the rows in wavelengths of the first octave, not negative.
        xs: coordinates of the columns.
        octaves: number of octaves.
        gain: amplitude of an octave over that of the one before.
    """
    total, power = np.zeros((len(ys), len(xs)), np.float32), 0.0
    for octave in range(octaves):
        rows, columns = spline_weights(ys * 2**octave), spline_weights(xs * 2**octave)
        rng = np.random.default_rng([*seed, octave])
        knots = rng.standard_normal((rows.shape[1], columns.shape[1]), np.float32)
        total += gain**octave * (rows @ knots @ columns.T)
        power += gain ** (2 * octave)
    return total * np.float32(2.1 / np.sqrt(power))


def octaves_within(size: int, lowest: float) -> int:
    """Return the number of octaves from `lowest` knots per side whose knots are FINEST px apart."""
    return max(1, 1 + int(np.floor(np.log2(size / FINEST / lowest))))


def antialias(distance: np.ndarray) -> np.ndarray:
    """Return the share of a pixel inside an edge that is `distance` px away, positive inside."""
    return np.clip(distance + 0.5, 0, 1)


class Canvas:
    """A picture in progress: float32 pixels [H, W, 3] and coordinates of their centers."""

    def __init__(self, scene: Scene, height: int, width: int):
        self.scene, self.height, self.width = scene, height, width
        self.y = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
        self.x = ((np.arange(width, dtype=np.float32) + 0.5) / width)[None]
        self.pixels = np.zeros((height, width, 3), np.float32)
        self.top, self.middle, self.haze, self.light = np.array(TIMES[scene.time], np.float32)
        self.sun = np.array(SUNS[scene.color], np.float32)

    def paint(self, color, alpha, rows=slice(None), columns=slice(None)) -> None:
        """Blend a color, [3] or [h, w, 3], over a part of the picture with alpha, [h, w]."""
        part = self.pixels[rows, columns]
        part += np.asarray(alpha, np.float32)[..., None] * (color - part)

    def below(self, ridge: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the antialiased share of each pixel below a ridge, [rows, W].

        Args:
            ridge: its height by column, [W].
            y: coordinates of the rows, [rows, 1].
        """
        slope = np.gradient(ridge) * self.height  # in px per px
        sharpness = self.height / np.sqrt(1 + np.minimum(slope**2, 3))
        return antialias((y - ridge) * sharpness)

    def window(self, left: float, right: float, top: float, bottom: float) -> tuple[slice, slice]:
        """Return the rows and columns between four coordinates, within the picture."""
        rows = (max(0, int(y * self.height)) for y in (top, bottom))
        columns = (max(0, int(x * self.width)) for x in (left, right))
        return slice(*rows), slice(*columns)

    def texture(self, seed: int, rows: slice, lowest: tuple[int, int], gain: float = 0.7):
        """Return noise of deviation 1 over rows of the picture, `lowest` knots per side."""
        octaves = min(map(octaves_within, (self.height, self.width), lowest))
        ys, xs = self.y[rows, 0] * lowest[0], self.x[0] * lowest[1]
        return noise((self.scene.seed, seed), ys, xs, octaves, gain)


def draw_sky(canvas: Canvas) -> None:
    """Draw the gradient, the stars, the clouds and the sun with its glow."""
    scene, y, x = canvas.scene, canvas.y, canvas.x
    depth = (canvas.y / scene.horizon)[..., None]
    upper, lower = np.clip(depth * 2, 0, 1), np.clip(depth * 2 - 1, 0, 1)
    gradient = canvas.top + (canvas.middle - canvas.top) * upper
    canvas.pixels[:] = gradient + (canvas.haze - canvas.middle) * lower**1.2
    distance = np.hypot(x - scene.x, y - scene.y)
    if scene.time == "night":
        draw_stars(canvas)
    rows = slice(0, round(scene.horizon * canvas.height))
    if scene.sky == "cloudy":
        field = canvas.texture(1, rows, (10, 3), 0.62)
        cover = smoothstep((field - 0.1) / 1.6) * smoothstep(1.25 - y[rows] / scene.horizon)
        cover *= np.minimum(1, 0.25 + distance[rows] / (4 * scene.radius))
        white = 255 * canvas.light
        bright = np.minimum(255, 0.55 * canvas.haze + 0.45 * white)
        shade = smoothstep((field - 0.9) / 2)[..., None]
        canvas.paint(bright * (1 - 0.22 * shade), 0.72 * cover, rows)
    away = np.maximum(distance - scene.radius, 0)
    glow = 0.42 * np.exp(-away / 0.045) + 0.16 * np.exp(-away / 0.2)
    canvas.paint(canvas.sun, glow)
    disk = antialias((scene.radius - distance) * min(canvas.height, canvas.width))
    canvas.paint(canvas.sun, disk)


def draw_stars(canvas: Canvas) -> None:
    """Draw stars whose radii follow an r^-3 law, so that a larger picture has more of them."""
    scene, size = canvas.scene, max(canvas.height, canvas.width)
    finest, octave, largest = 0.7 / size, 0, 0.0036
    while largest > finest:
        rng = np.random.default_rng([scene.seed, 3, octave])
        count = rng.poisson(14 * 4**octave)
        radii = largest / np.sqrt(1 + 3 * rng.random(count))
        x, y = rng.random(count), scene.horizon * rng.random(count) ** 1.3
        brightness = rng.uniform(0.45, 1, count)
        is_seen = (radii >= finest) & (np.hypot(x - scene.x, y - scene.y) > 1.5 * scene.radius)
        for star in np.stack([x, y, radii, brightness], 1)[is_seen]:
            draw_dot(canvas, *star)
        octave, largest = octave + 1, largest / 2


def draw_dot(canvas: Canvas, x: float, y: float, r: float, alpha: float) -> None:
    """Draw a small bright disk."""
    right, bottom = x + r + 2 / canvas.width, y + r + 2 / canvas.height
    left, top = x - r - 1 / canvas.width, y - r - 1 / canvas.height
    rows, columns = canvas.window(left, right, top, bottom)
    distance = np.hypot(canvas.x[:, columns] - x, canvas.y[rows] - y)
    inside = antialias((r - distance) * canvas.height)
    canvas.paint(np.float32(STAR), alpha * inside, rows, columns)


def draw_mountains(canvas: Canvas) -> None:
    """Draw three ridges, each nearer, lower and less hazy than the one before."""
    scene, n = canvas.scene, canvas.width
    forest = scene.cover == "forested"
    color = np.array(HILLS[scene.hills], np.float32) * canvas.light * (0.82 if forest else 1)
    first, last = (round(y * canvas.height) for y in (scene.horizon - 0.27, scene.horizon))
    rows = slice(first, last + 1)
    y = canvas.y[rows]
    relief = canvas.texture(4, rows, (14, 10), 0.74)
    for layer, (base, swing, lowest, haze) in enumerate(RIDGES):
        ridge = line((scene.seed, 5, layer), n, lowest, 0.42 if forest else 0.5)
        ridge = scene.horizon - base - swing * np.clip(1.15 * ridge, -1.3, 1.3)
        if forest and layer:
            ridge = ridge - treetops((scene.seed, 6, layer), n, 90 // layer, 0.016 * layer)
        ridge = np.minimum(ridge, scene.horizon - 0.004)
        share, depth = canvas.below(ridge, y), np.maximum(y - ridge, 0)
        bumps = (relief, relief[:, ::-1], -relief)[layer]
        body = color[None, None] * (1 + (0.1 + 0.03 * layer) * bumps[..., None])
        if scene.cover == "snowy" and layer < 2:
            line_of_snow = (0.055 - 0.03 * layer) * (1 + 0.5 * bumps)
            snow = smoothstep((line_of_snow - depth) * canvas.height / 4 + 0.5)
            white = np.array(SNOW, np.float32) * canvas.light**0.7
            body += snow[..., None] * (white * (0.94 + 0.07 * bumps[..., None]) - body)
        fog = haze + (1 - haze) * 0.55 * smoothstep(depth / (0.2 - 0.03 * layer)) * (layer < 2)
        body += fog[..., None] * (canvas.haze - body)
        canvas.paint(body, share, rows)


def treetops(seed: tuple, size: int, count: int, height: float) -> np.ndarray:
    """Return the heights of a row of conifers over [0, 1], [size], each with finer twigs."""
    x = (np.arange(size) + 0.5) / size
    tops = np.zeros(size)
    for layer in range(3):
        rng = np.random.default_rng([*seed, layer])
        heights = rng.uniform(0.25, 1, count + 1)
        place = x * count + layer / 3
        cone = 1 - 2 * abs(place % 1 - 0.5)
        tops = np.maximum(tops, heights[place.astype(int) % (count + 1)] * cone)
    return height * tops


def draw_lake(canvas: Canvas) -> None:
    """Draw the mirror image of what is above, broken by ripples, and the sun's path of light."""
    scene, height, width = canvas.scene, canvas.height, canvas.width
    first = round(scene.horizon * height)
    rows = slice(first, height)
    depth = (canvas.y[rows] - scene.horizon) / (1 - scene.horizon)  # 0 at the far shore
    # ripples are flat and dense far away, tall and wide near
    distance = np.log2(1 + 14 * depth[:, 0]) * 9
    octaves = octaves_within(height, 40)
    ripples = noise((scene.seed, 7), distance, canvas.x[0] * 5, octaves + 1, 0.8)
    sideways = (0.003 + 0.02 * depth) * ripples
    mirrored = 2 * scene.horizon - canvas.y[rows] - 0.012 * depth * ripples
    up = np.clip(mirrored * height, 0, first - 1).astype(np.int32)
    across = np.clip((canvas.x + sideways) * width, 0, width - 1).astype(np.int32)
    water = canvas.pixels.reshape(-1, 3)[up * width + across]
    tint = np.array(GROUNDS["lake"], np.float32) * canvas.light
    water += (0.24 + 0.1 * depth[..., None]) * (tint - water)
    water *= 1 + 0.035 * ripples[..., None] * (0.3 + depth[..., None])
    canvas.pixels[rows] = water
    spread = scene.radius * (0.55 + 0.7 * depth)
    path = np.exp(-(((canvas.x - scene.x) / spread) ** 2))
    glitter = smoothstep((ripples + 1.3 * path - 1.1) * 1.6) * path * (0.35 + 0.4 * (1 - depth))
    canvas.paint(canvas.sun, glitter, rows)
    shore = np.exp(-depth * (1 - scene.horizon) * 110)
    canvas.paint(canvas.haze, 0.75 * shore * np.ones_like(canvas.x), rows)


def draw_land(canvas: Canvas) -> None:
    """Draw a meadow of rolling ground and grass, or dunes with a lit and a dark side."""
    scene, height, width = canvas.scene, canvas.height, canvas.width
    first = round(scene.horizon * height)
    rows = slice(first, height)
    y = canvas.y[rows]
    color = np.array(GROUNDS[scene.ground], np.float32) * canvas.light
    desert = scene.ground == "desert"
    far = color + 0.35 * (canvas.haze - color)
    canvas.pixels[rows] = far
    grain = canvas.texture(8, rows, (24, 12) if desert else (24, 60), 0.85)
    sunward = np.sign(scene.x - canvas.x[0])
    for layer in range(5):
        near = (layer + 0.6) / 5
        top = scene.horizon + (1 - scene.horizon) * (0.03 + 0.85 * near**1.5) * 0.9
        wave = line((scene.seed, 9, layer), width, 2, 0.42 if desert else 0.35, smooth=not desert)
        ridge = top - (0.012 + 0.05 * near) * wave
        ridge = np.maximum(ridge, scene.horizon + 0.006)
        share, below = canvas.below(ridge, y), np.maximum(y - ridge, 0)
        body = far + (color - far) * near
        slope = np.gradient(ridge, 1 / width)
        lit = np.clip(slope * sunward * 1.2, -1, 1) if desert else 0 * slope
        shade = 1 - 0.1 * near + 0.16 * np.exp(-below / (0.02 + 0.05 * near)) + 0.12 * lit
        shade = shade + grain * (0.02 + (0.03 if desert else 0.06) * near)
        canvas.paint(body * shade[..., None], share, rows)


def draw_pines(canvas: Canvas) -> None:
    """Draw a few conifers in front, at the left and right edges."""
    scene = canvas.scene
    rng = np.random.default_rng([scene.seed, 10])
    dark = np.array(PINE, np.float32) * canvas.light * 1.1
    for tree in range(rng.integers(3, 7)):
        side, inward = rng.random() < 0.5, rng.uniform(-0.02, 0.2)
        x, foot = (1 - inward) if side else inward, rng.uniform(0.88, 1.02)
        tall = rng.uniform(0.3, 0.5) * (1 - 1.6 * max(inward, 0))
        wide = 0.2 * tall
        rows, columns = canvas.window(x - wide, x + wide + 1 / canvas.width, foot - tall, foot)
        down = (canvas.y[rows, 0] - foot + tall) / tall  # 0 at the tip
        tiers = 9 + rng.integers(4)
        step = down * tiers
        width = wide * down * (0.62 + 0.5 * (step % 1))
        seed = (scene.seed, 11, tree)
        n = int(tall * canvas.height)
        grid = (np.arange(n) + 0.5) / n
        ragged = [np.interp(down, grid, line((*seed, k), n, 24, 0.8)) for k in range(2)]
        left, right = (width * (1 + 0.28 * jitter) for jitter in ragged)
        trunk = np.where(down > 0.93, 0.12 * wide, 1)
        left, right = np.minimum(left, trunk), np.minimum(right, trunk)
        offset = canvas.x[:, columns] - x
        edge = np.minimum(offset + left[:, None], right[:, None] - offset)
        canvas.paint(dark, antialias(0.7 * edge * canvas.width), rows, columns)


def draw_birds(canvas: Canvas) -> None:
    """Draw a flock of birds, each two arcs."""
    scene = canvas.scene
    rng = np.random.default_rng([scene.seed, 12])
    side = -1 if scene.x > 0.5 else 1
    center = scene.x + side * rng.uniform(0.2, 0.26), rng.uniform(0.14, 0.26)
    dark = canvas.top * 0.25
    for _ in range(rng.integers(4, 8)):
        x, y = center[0] + rng.normal(0, 0.055), center[1] + rng.normal(0, 0.035)
        span = rng.uniform(0.016, 0.026)
        rows, columns = canvas.window(x - span, x + span, y - span, y + span)
        across = abs(canvas.x[:, columns] - x) / span
        wing = y - span * 0.9 * across * (1 - across) * 1.6 + span * 0.1
        thick = 0.1 * span * (1.2 - across)
        edge = thick - abs(canvas.y[rows] - wing)
        canvas.paint(dark, antialias(edge * canvas.height) * (across < 1), rows, columns)


def render(scene: Scene, height: int, width: int | None = None) -> np.ndarray:
    """Render a scene, uint8 [height, width, 3].

    An image that is not square shows a stretched scene, as encodings with a scale per axis
    generate it.

    Args:
        scene: content.
        height: px.
        width: px; None: `height`.
    """
    canvas = Canvas(scene, height, height if width is None else width)
    draw_sky(canvas)
    if scene.extra == "birds":
        draw_birds(canvas)
    draw_mountains(canvas)
    draw_lake(canvas) if scene.ground == "lake" else draw_land(canvas)
    if scene.extra == "pines":
        draw_pines(canvas)
    return canvas.pixels.clip(0, 255).astype(np.uint8)
