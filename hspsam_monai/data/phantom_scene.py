"""How a phantom frame is drawn: tube, folds, polyps, light, camera.

A frame is built as a camera sees a gut: a depth map of a bent tube with folds, polyps raised from its wall,
light that comes from the camera and fades with depth, wet highlights, and the camera's frame, colours, blur
and noise. Lengths are in half heights of the picture, so that phantoms look alike at any size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

_SMALLEST_POLYP = 0.004  # share of the picture; smaller ones would be hidden by folds or the frame
_PLACEMENTS = 6  # tries to find a visible place
_ROUNDS = 20
_SHAPES = ("sessile", "flat", "pedunculated", "lobed")


def draw_frame(rng: np.random.Generator, size: tuple[int, int], empty: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draw one frame.

    Args:
        rng: source of everything random.
        size: (H, W) in pixels.
        empty: without polyp.

    Returns:
        Image (H, W, 3) uint8 RGB, and mask (H, W) uint8 with 1 on polyps.
    """
    scene = _Scene.make(rng, *size)
    mask = np.zeros(size, bool)
    shade = np.ones(size, np.float32)
    if not empty:
        wanted = 1 if rng.random() < 0.85 else 2
        for _ in range(_ROUNDS):  # nearly always one round; folds and frame can hide all places of it
            for _ in range(wanted):
                mask |= _add_polyp(rng, scene, shade)
            if (mask & scene.visible).any():
                break
    image = _camera(rng, _light(rng, scene, mask, shade), scene.visible)
    return image, (mask & scene.visible).astype(np.uint8)


@dataclass
class _Scene:
    """The gut before polyps.

    Args:
        x: (1, W) columns, 0 in the middle of the picture, in half heights.
        y: (H, 1) rows.
        log_depth: (H, W) logarithm of the distance, 0 at the entry of the tube.
        visible: (H, W) inside the camera's frame.
        texture: (H, W) how rough the polyps' surface is painted; 0 on the wall.
        albedo_shift: (H, W) polyp's own colour, 0 on the wall.
    """

    x: np.ndarray
    y: np.ndarray
    log_depth: np.ndarray
    visible: np.ndarray
    texture: np.ndarray
    albedo_shift: np.ndarray

    @classmethod
    def make(cls, rng: np.random.Generator, height: int, width: int) -> _Scene:
        half = height / 2
        y = ((np.arange(height, dtype=np.float32) - half + 0.5) / half)[:, None]
        x = ((np.arange(width, dtype=np.float32) - width / 2 + 0.5) / half)[None, :]
        zeros = np.zeros((height, width), np.float32)
        depth = _tube(rng, x, y)
        return cls(x, y, np.log(depth), _frame(rng, x, y), zeros, zeros.copy())


def _noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> np.ndarray:
    """Smooth random field (H, W) of standard deviation near 1 with blobs of `cell` half heights."""
    step = max(1.0, cell * shape[0] / 2)
    grid = rng.standard_normal((int(shape[0] / step) + 4, int(shape[1] / step) + 4)).astype(np.float32)
    box = (1.5, 1.5, 1.5 + shape[1] / step, 1.5 + shape[0] / step)
    smooth = Image.fromarray(grid).resize(shape[::-1], Image.Resampling.BICUBIC, box=box)
    return np.asarray(smooth) * 1.4  # interpolation takes away some variance


def _tube(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Depth (H, W) of a bent tube with folds, 1 at the camera's edge of view and larger inside.

    A ring-shaped fold at depth z with inner radius q is seen at radii above q / z and hides what lies behind,
    so the depth is the smallest z of all folds that cover a pixel, or of the wall itself.
    """
    shape = (y.shape[0], x.shape[1])
    close_up = rng.random() < 0.3
    distance, angle = rng.uniform(0.9, 1.5) if close_up else rng.uniform(0, 0.55), rng.uniform(0, 2 * np.pi)
    centre = np.array([distance * np.cos(angle), distance * np.sin(angle)], np.float32)
    bend = rng.normal(0, 0.22, 2).astype(np.float32)
    wobble_x, wobble_y = 0.05 * _noise(rng, shape, 0.6), 0.05 * _noise(rng, shape, 0.6)
    u, v = x - centre[0] + wobble_x, y - centre[1] + wobble_y
    theta = np.arctan2(v, u)
    lobes = 1 + 0.12 * np.cos(2 * theta + rng.uniform(0, 6.3)) + 0.1 * np.cos(3 * theta + rng.uniform(0, 6.3))
    entry = rng.uniform(1.5, 2.0) if close_up else rng.uniform(1.15, 1.6)  # wall radius at depth 1
    depth = entry / (np.hypot(u, v) / lobes + 0.04)
    z = rng.uniform(1.2, 1.7)
    for _ in range(9):
        shift = bend * (1 - 1 / z)
        du, dv = u - shift[0], v - shift[1]
        angle_here = np.arctan2(dv, du)
        start = rng.uniform(0, 2 * np.pi)
        # Three semilunar folds a ring, of unequal height; some rings are nearly flat.
        arcs = 0.55 + 0.45 * np.cos(3 * angle_here + start) * rng.uniform(0.4, 1)
        arcs = arcs + 0.25 * np.cos(angle_here + rng.uniform(0, 6.3))
        height = np.clip(arcs, 0, 1) * rng.uniform(0.15, 0.5)
        inner = entry * (1 - height) / z
        radius = np.hypot(du, dv) / lobes
        # A fold is round, not a disc: its face leans back towards the crest.
        lean = 1 + 0.12 * np.clip((radius - inner) / (inner * 0.35 + 1e-3), 0, 1.5)
        depth = np.where((radius >= inner) & (height > 0.02), np.minimum(depth, z * 1.06 / lean), depth)
        z *= rng.uniform(1.22, 1.55)
    return np.maximum(depth, 0.5).astype(np.float32)


def _frame(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Visible part (H, W) of the sensor: cut corners, a circle, an inset window or everything."""
    side = float(x.max())
    kind = rng.choice(["corners", "circle", "inset", "full"], p=[0.55, 0.15, 0.2, 0.1])
    if kind == "corners":
        visible = np.abs(x) / side + np.abs(y) < rng.uniform(1.4, 1.6)
        if rng.random() < 0.4:  # the box where some consoles show the scope's position
            visible &= ~((x < -side * rng.uniform(0.3, 0.5)) & (y > rng.uniform(0.3, 0.5)))
    elif kind == "circle":
        visible = np.hypot(x - rng.normal(0, 0.05), y) < rng.uniform(1.0, 1.15)
    elif kind == "inset":
        edge = rng.uniform(0.88, 0.95)
        visible = (np.abs(x) < edge * min(side, 1.1)) & (np.abs(y) < edge) & (np.abs(x) + np.abs(y) < 1.5 * edge)
    else:
        visible = np.ones((y.shape[0], x.shape[1]), bool)
    return visible


def _add_polyp(rng: np.random.Generator, scene: _Scene, shade: np.ndarray) -> np.ndarray:
    """Raise one polyp from the wall; returns where it is (H, W) bool, all False if no place was found."""
    for _ in range(_PLACEMENTS):
        px, py = rng.uniform(-0.75, 0.75) * float(scene.x.max()), rng.uniform(-0.75, 0.75)
        row = int(np.clip((py + 1) / 2 * shade.shape[0], 0, shade.shape[0] - 1))
        column = int(np.clip((px / scene.x.max() + 1) / 2 * shade.shape[1], 0, shade.shape[1] - 1))
        base = float(scene.log_depth[row, column])
        if not scene.visible[row, column] or base > np.log(5):
            continue
        kind = str(rng.choice(_SHAPES, p=[0.4, 0.2, 0.2, 0.2]))
        size = float(np.clip(rng.lognormal(np.log(0.38), 0.45), 0.12, 0.75)) / np.exp(0.6 * max(base, 0))
        profile, inside = _polyp_profile(rng, scene, (px, py), max(size, 0.09), kind)
        covered = scene.log_depth < base - 0.45  # folds well in front hide it
        inside &= ~covered
        if (inside & scene.visible).mean() >= _SMALLEST_POLYP:
            break
    else:
        return np.zeros(shade.shape, bool)
    rise = {"flat": 0.2, "sessile": 0.75, "lobed": 0.8, "pedunculated": 0.9}[kind] * size * rng.uniform(0.8, 1.2)
    # Its surface does not follow the folds under it: mostly one depth, tilted a little.
    tilt = rng.normal(0, 0.12, 2)
    own = base + tilt[0] * (scene.x - px) + tilt[1] * (scene.y - py)
    keep = 0.6 if kind == "flat" else 0.15
    surface = keep * scene.log_depth + (1 - keep) * own - rise * profile
    scene.log_depth[inside] = surface[inside]
    scene.texture[inside] = rng.choice([0.0, 0.5, 1.0], p=[0.35, 0.4, 0.25])
    scene.albedo_shift[inside] = rng.normal(0.25, 0.45) * (0.5 if kind == "flat" else 1)
    # Light hardly reaches the wall around its foot.
    reach = max(1.0, size * shade.shape[0] / 2 * 0.16)
    foot = gaussian_filter(inside.astype(np.float32), reach, truncate=2.5)
    shade *= np.where(inside, 1, 1 - (0.25 if kind == "flat" else 0.7) * foot)
    return inside


def _polyp_profile(
    rng: np.random.Generator, scene: _Scene, place: tuple[float, float], size: float, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Height profile (H, W) in [0, 1] and outline (H, W) bool of one polyp."""
    wander = 0.07 * size
    shape = scene.log_depth.shape
    x = scene.x - place[0] + wander * _noise(rng, shape, max(size * 0.7, 0.08))
    y = scene.y - place[1] + wander * _noise(rng, shape, max(size * 0.7, 0.08))
    turn = rng.uniform(0, np.pi)
    along, across = x * np.cos(turn) + y * np.sin(turn), -x * np.sin(turn) + y * np.cos(turn)
    blobs = [(0.0, 0.0, size, rng.uniform(0.65, 1.0))]
    if kind == "lobed":
        for _ in range(int(rng.integers(2, 5))):
            at = rng.uniform(0, 2 * np.pi)
            off = size * rng.uniform(0.4, 0.7)
            blobs.append((off * np.cos(at), off * np.sin(at), size * rng.uniform(0.4, 0.65), rng.uniform(0.8, 1.1)))
    profile = np.zeros(shape, np.float32)
    for dx, dy, radius, ratio in blobs:
        rho2 = ((along - dx) / radius) ** 2 + ((across - dy) / (radius * ratio)) ** 2
        # The exponent makes the flank steep, as round bodies look; flat ones rise as a low step.
        height = np.clip(1 - rho2, 0, 1) ** (0.3 if kind == "flat" else 0.5) * (radius / size) ** 0.5
        profile = np.maximum(profile, height)
    if kind == "pedunculated":
        length, thick = size * rng.uniform(1.0, 1.6), size * rng.uniform(0.22, 0.34)
        stalk = np.clip(1 - (across / thick) ** 2, 0, 1) ** 0.5 * ((along > 0) & (along < length))
        profile = np.maximum(profile, 0.45 * stalk * np.clip(1.3 - along / length, 0, 1))
    return profile, profile > 0.02


def _vessels(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Branching vessels (H, W) in [0, 1], drawn as random walks."""
    canvas = Image.new("L", shape[::-1])
    draw = ImageDraw.Draw(canvas)
    unit = shape[0] / 256
    walks = [
        (rng.uniform(0, shape[1]), rng.uniform(0, shape[0]), rng.uniform(0, 6.3), 1.0)
        for _ in range(int(rng.integers(5, 14)))
    ]
    for _ in range(60):
        if not walks:
            break
        px, py, heading, strength = walks.pop()
        turns = rng.normal(0, 0.28, 26)
        fork = int(rng.integers(6, 22))
        for index, turn in enumerate(turns.tolist()):
            heading += turn
            qx, qy = px + 5 * unit * np.cos(heading), py + 5 * unit * np.sin(heading)
            draw.line((px, py, qx, qy), fill=int(255 * strength), width=max(1, round(1.6 * strength * unit)))
            px, py = qx, qy
            if index == fork and strength > 0.4:
                walks.append((px, py, heading + rng.choice([-0.8, 0.8]), strength * 0.72))
    return gaussian_filter(np.asarray(canvas, np.float32) / 255, 0.7 * unit)


def _light(rng: np.random.Generator, scene: _Scene, mask: np.ndarray, shade: np.ndarray) -> np.ndarray:
    """Colour (H, W, 3) in [0, about 1.3] of the scene lit from the camera."""
    shape = mask.shape
    unit = shape[0] / 256
    bumps = 0.012 * _noise(rng, shape, 0.16) + 0.0025 * _noise(rng, shape, 0.05)
    log_depth = gaussian_filter(scene.log_depth, 1.6 * unit) + bumps
    gy, gx = np.gradient(log_depth, np.float32(2 / shape[0]))
    # At a fold's crest depth jumps; the slope there is the picture's resolution, not the tissue's.
    limit = 1 / (1 + np.hypot(gx, gy) / 3)
    gx, gy = gx * limit, gy * limit
    lamp = np.clip(rng.normal(0, 0.3, 2), -0.5, 0.5).astype(np.float32)
    facing = (1 + lamp[0] * gx + lamp[1] * gy) / np.sqrt(1 + gx**2 + gy**2)
    facing = np.clip(facing, 0, 1.25)
    fall = np.exp(-rng.uniform(1.2, 1.6) * log_depth)
    # What lies behind a crest gets little light; the crest itself shines through a little.
    behind = log_depth - gaussian_filter(log_depth, 9 * unit, truncate=2)
    crest = np.exp(-2.4 * np.clip(behind, 0, 1)) * (1 + 0.6 * np.clip(-behind, 0, 0.35))
    energy = (0.04 + 0.96 * facing**1.7) * fall * shade * crest * rng.uniform(1.5, 2.8)
    light = 1 - np.exp(-energy)
    albedo = _albedo(rng, scene, mask)
    # Tissue in shade looks redder, because red light travels farthest inside it.
    gamma = np.array([0.85, 1.25, 1.45], np.float32)
    colour = albedo * light[..., None] ** gamma * 1.15
    return colour + _highlights(rng, (gx, gy), fall, mask)[..., None]


def _albedo(rng: np.random.Generator, scene: _Scene, mask: np.ndarray) -> np.ndarray:
    """Tissue colour (H, W, 3): mottled mucosa, vessels, polyps, and sometimes yellow residue."""
    shape = mask.shape
    pink, orange, pale = np.array([[0.94, 0.59, 0.51], [0.97, 0.66, 0.43], [0.93, 0.75, 0.62]], np.float32)
    mix = rng.dirichlet([2, 2, 1])
    base = (mix[0] * pink + mix[1] * orange + mix[2] * pale).astype(np.float32)
    mottle = 0.6 * _noise(rng, shape, 0.35) + 0.4 * _noise(rng, shape, 0.1) + 0.25 * _noise(rng, shape, 0.03)
    red = np.array([-0.01, -0.055, -0.05], np.float32)
    albedo = base + mottle[..., None] * red * rng.uniform(0.5, 1.2)
    vessels = _vessels(rng, shape) * rng.uniform(0.1, 0.75) * np.clip(0.7 + 0.5 * _noise(rng, shape, 0.5), 0, 1.3)
    albedo = albedo * (1 - np.where(mask, 0.3, 1)[..., None] * vessels[..., None] * np.array([0.3, 0.75, 0.7]))
    if mask.any():
        albedo = albedo + scene.albedo_shift[..., None] * np.array([-0.02, -0.2, -0.16], np.float32)
        # Pits and ridges of the glands: the zero lines of a fine field make a worm-like pattern.
        pits = np.exp(-((_noise(rng, shape, 0.035) / 0.35) ** 2)) * scene.texture
        albedo = albedo * (1 - pits[..., None] * np.array([0.1, 0.24, 0.22], np.float32))
    if rng.random() < 0.3:
        stain = (
            np.clip(0.5 * (_noise(rng, shape, 0.3) + 0.4 * _noise(rng, shape, 0.07) - 1.2), 0, 0.7)[..., None]
            * np.where(mask, 0.4, 1)[..., None]
        )
        albedo = albedo * (1 - stain) + stain * np.array([0.93, 0.66, 0.25], np.float32)
    return np.clip(albedo, 0.05, 1).astype(np.float32)


def _highlights(
    rng: np.random.Generator, slope: tuple[np.ndarray, np.ndarray], fall: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Mirror reflections (H, W) of the lamp: where the rippled wet surface happens to face it."""
    shape = mask.shape
    ripple = rng.uniform(0.35, 0.6)
    away = np.zeros(shape, np.float32)
    for part in slope:
        waves = ripple * _noise(rng, shape, 0.11) + 0.5 * ripple * _noise(rng, shape, 0.035)
        away += (part + waves + rng.normal(0, 0.1)) ** 2
    wet = np.clip(rng.uniform(0, 0.4) + 0.8 * _noise(rng, shape, 0.45) + np.where(mask, 0.35, 0), 0.02, 1.3)
    spots = np.clip(1.6 - away / (rng.uniform(0.02, 0.05) * wet), 0, 1) * np.clip(fall * 2, 0, 1)
    return spots + 0.4 * gaussian_filter(spots, 1.6 * shape[0] / 256)


def _camera(rng: np.random.Generator, colour: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Lens, sensor and console: (H, W, 3) float -> uint8."""
    height, width = visible.shape
    unit = height / 256
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    colour = colour * (1 - rng.uniform(0.05, 0.4) * (x**2 + y**2) / 2)[..., None]
    cast = rng.normal(1, 0.05, 3) * np.array([1, 1, 0.97])
    colour = colour * cast.astype(np.float32)
    grey = colour.mean(-1, keepdims=True)
    colour = grey + (colour - grey) * rng.uniform(0.8, 1.15)
    sigma = max(0.35, rng.normal(0.7, 0.3)) * unit
    colour = gaussian_filter(colour, (sigma, sigma, 0), truncate=3)
    noise = rng.standard_normal((height, width), dtype=np.float32) * rng.uniform(0.004, 0.016)
    colour = colour + noise[..., None] * np.array([1, 0.9, 1.2], np.float32)
    edge = gaussian_filter(visible.astype(np.float32), 0.6 * unit)[..., None]
    return (np.clip(colour * edge, 0, 1) * 255 + 0.5).astype(np.uint8)
