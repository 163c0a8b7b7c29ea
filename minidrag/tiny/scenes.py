"""Random scenes, their captions, and drags whose true result is known.

The result of a drag is itself a scene that `random_scene` can draw, so it is in the training distribution.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from minidrag.tiny.objects import COLORS, DRAW, LOOK, RISE, SMILE, Array, Object, grips
from minidrag.tiny.renderer import GROUNDS, PALETTES, SIDE, Part, Scene, layer_map, layers, render

Random = random.Random | np.random.Generator
Point = tuple[float, float]

LIGHT_X = (0.12, 0.88)  # least and most
LIGHT_Y = (0.11, 0.26)
PEAK_X = (0.08, 0.92)
PEAK_HEIGHT = (0.12, 0.30)
STRETCH = (0.75, 1.4)
SIDE_GAP = 0.06  # least distance of an object from the left and right border
HORIZON_GAP = 0.05  # least distance of its foot from the horizon
LOWEST = 0.95  # largest y of its foot


def _choose(rng: Random, choices: Sequence[str]) -> str:
    return choices[int(rng.random() * len(choices))]


def _random_object(rng: Random, horizon: float, color: str) -> Object:
    kind = _choose(rng, tuple(DRAW))
    size = rng.uniform(0.32, 0.46) if kind == "face" else rng.uniform(0.22, 0.40)
    return Object(
        kind,
        color,
        x=rng.uniform(SIDE_GAP + size / 2, 1 - SIDE_GAP - size / 2),
        y=rng.uniform(horizon + HORIZON_GAP, LOWEST),
        size=size,
        stretch=rng.uniform(*STRETCH) if kind in RISE else 1.0,
        gaze=rng.uniform(-1, 1) if kind == "face" else 0.0,
        smile=rng.uniform(0, 1) if kind == "face" else 0.0,
    )


def _both_visible(one: Object, other: Object) -> bool:
    """True if neither object can hide the other completely."""
    return abs(one.x - other.x) > 0.3 * (one.size + other.size)


def random_scene(rng: Random) -> Scene:
    """Draw a scene with one object, or with two of different colors, each at least partly visible."""
    horizon = rng.uniform(0.46, 0.68)
    colors = list(COLORS)
    objects = [_random_object(rng, horizon, colors.pop(int(rng.random() * len(colors))))]
    second_color = _choose(rng, colors)
    count = 1 if rng.random() < 0.4 else 2
    while len(objects) < count:
        thing = _random_object(rng, horizon, second_color)
        if _both_visible(thing, objects[0]):
            objects.append(thing)
    peaks = (0.2, 0.5, 0.8) if rng.random() < 0.5 else (0.28, 0.72)
    return Scene(
        peaks=tuple((x + rng.uniform(-0.12, 0.12), rng.uniform(*PEAK_HEIGHT)) for x in peaks),
        time=_choose(rng, tuple(PALETTES)),
        light_x=rng.uniform(*LIGHT_X),
        light_y=rng.uniform(*LIGHT_Y),
        horizon=horizon,
        ground=_choose(rng, tuple(GROUNDS)),
        objects=tuple(objects),
    )


def _is_valid(scene: Scene) -> bool:
    """True if `random_scene` could have drawn the scene."""

    def within(value: float, limits: tuple[float, float]) -> bool:
        return limits[0] <= value <= limits[1]

    return (
        within(scene.light_x, LIGHT_X)
        and within(scene.light_y, LIGHT_Y)
        and all(within(x, PEAK_X) and within(height, PEAK_HEIGHT) for x, height in scene.peaks)
        and all(_both_visible(*pair) for pair in zip(scene.objects, scene.objects[1:], strict=False))
        and all(
            within(thing.x, (SIDE_GAP + thing.size / 2, 1 - SIDE_GAP - thing.size / 2))
            and within(thing.y, (scene.horizon + HORIZON_GAP, LOWEST))
            and (thing.kind not in RISE or within(thing.stretch, STRETCH))
            and within(thing.gaze, (-1, 1))
            and within(thing.smile, (0, 1))
            for thing in scene.objects
        )
    )


def caption(scene: Scene) -> str:
    """Caption such as "a red ball on the left and a blue house on the right, on grass, at dusk"."""
    positions = ("on the left", "in the middle", "on the right")
    phrases = []
    for thing in sorted(scene.objects, key=lambda thing: thing.x):
        article = "an" if thing.color == "orange" else "a"
        phrases.append(f"{article} {thing.color} {thing.kind} {positions[min(2, int(thing.x * 3))]}")
    return f"{' and '.join(phrases)}, on {scene.ground}, {PALETTES[scene.time].phrase}"


@dataclass(frozen=True)
class Drag:
    """A drag of a scene, with its true result."""

    name: str  # starts with move, carry, shift, raise, lower, stretch, shrink, turn, widen or narrow
    handles: tuple[Point, ...]  # (x, y) in pixels of the 128x128 image; (0, 0) is the first pixel's center
    targets: tuple[Point, ...]
    mask: Image.Image  # mode "L", 255 in the editable region; contains every pixel that changes
    after: Scene  # result of a perfect edit


@dataclass(frozen=True)
class _Edit:
    """An edited scene, before its handles are chosen."""

    name: str
    after: Scene
    candidates: tuple[tuple[tuple[Part, str], ...], ...]  # per handle: (part, grip) in order of preference
    carried: Part | None = None  # part that gets several handles


EDGE = 6  # pixels: least distance of handles and targets from the image border
MARGIN = 4  # pixels between the changed region and the edge of the mask
CARRY_HANDLES = 5
CARRY_SPACING = 4  # pixels: least distance of these handles from each other and from the outline
TRIES = 40


def _grip_pixels(scene: Scene, part: Part) -> dict[str, Point]:
    """Grips of a part of the scene, (x, y) in pixels."""
    kind, index = part
    if kind == "light":
        offsets = {"middle": 0.0, "left": -0.04, "right": 0.04}
        points = {grip: (scene.light_x + offset, scene.light_y) for grip, offset in offsets.items()}
    elif kind == "peak":
        x, height = scene.peaks[index]
        points = {"tip": (x, scene.horizon - height + 0.03)}
    else:
        thing = scene.objects[index]
        points = {
            grip: (thing.x + u * thing.size, thing.y - v * thing.size)
            for grip, (u, v) in grips(thing).items()
        }
    return {grip: (x * SIDE - 0.5, y * SIDE - 0.5) for grip, (x, y) in points.items()}


def _layer_index(scene: Scene, part: Part) -> int:
    return [drawn for drawn, _ in layers(scene)].index(part)


def _is_visible(scene: Scene, labels: Array, part: Part, point: Point) -> bool:
    """True if the part is visible at the point and two pixels around it, away from the border.

    labels: `layer_map(scene)`.
    """
    column = round(point[0])
    row = round(point[1])
    if min(point) < EDGE or max(point) > SIDE - 1 - EDGE:
        return False
    around = labels[[row, row - 2, row + 2, row, row], [column, column, column, column - 2, column + 2]]
    return bool((around == _layer_index(scene, part)).all())


def _mask(before: Image.Image, after: Image.Image, points: Sequence[Point]) -> Image.Image:
    """Convex hull of the changed pixels and the points, plus a margin: roughly what a user would paint."""
    changed = (np.asarray(before) != np.asarray(after)).any(axis=-1)
    rows, columns = np.nonzero(changed)
    x, y = np.concatenate([np.array(points), np.stack([columns, rows], axis=1)]).T
    column = np.arange(SIDE)
    row = column[:, None]
    inside = np.ones((SIDE, SIDE), dtype=bool)
    for angle in np.linspace(0, 2 * np.pi, 32, endpoint=False):
        across = np.cos(angle)
        down = np.sin(angle)
        inside &= column * across + row * down <= (x * across + y * down).max() + MARGIN
    return Image.fromarray(inside.astype(np.uint8) * 255)


def _interior(scene: Scene, labels: Array, part: Part) -> Array:
    """Visible region of a part, eroded and away from the image border: (SIDE, SIDE), bool."""
    visible = Image.fromarray(labels == _layer_index(scene, part)).convert("L")
    eroded = np.asarray(visible.filter(ImageFilter.MinFilter(2 * CARRY_SPACING + 1))) > 0
    return eroded & np.pad(np.ones((SIDE - 2 * EDGE - 2,) * 2, dtype=bool), EDGE + 1)


def _spread_handles(
    before: Array, after: Array, handle: Point, target: Point
) -> tuple[list[Point], list[Point]]:
    """Add handles by farthest-point sampling on a part that moves rigidly; return handles and targets.

    before, after: (SIDE, SIDE), bool, the pixels allowed for handles and for targets.
    """
    right = target[0] - handle[0]
    down = target[1] - handle[1]
    pixels = np.argwhere(before & np.roll(after, (-round(down), -round(right)), axis=(0, 1)))[:, ::-1]
    handles = [handle]
    while len(handles) < CARRY_HANDLES and len(pixels):
        nearest = np.min([np.hypot(*(pixels - one).T) for one in handles], axis=0)
        if nearest.max() < CARRY_SPACING:
            break
        handles.append(tuple(pixels[nearest.argmax()].astype(float).tolist()))
    return handles, [(x + right, y + down) for x, y in handles]


def _make_drag(scene: Scene, labels: Array, edit: _Edit) -> Drag | None:
    """Choose handles visible before and after the edit; None if there are none.

    labels: `layer_map(scene)`.
    """
    labels_after = layer_map(edit.after)
    handles = []
    targets = []
    for candidates in edit.candidates:
        for part, grip in candidates:
            handle = _grip_pixels(scene, part)[grip]
            target = _grip_pixels(edit.after, part)[grip]
            visible_before = _is_visible(scene, labels, part, handle)
            if visible_before and _is_visible(edit.after, labels_after, part, target):
                handles.append(handle)
                targets.append(target)
                break
        else:
            return None
    if edit.carried:
        before = _interior(scene, labels, edit.carried)
        after = _interior(edit.after, labels_after, edit.carried)
        handles, targets = _spread_handles(before, after, handles[0], targets[0])
    mask = _mask(render(scene), render(edit.after), [*handles, *targets])
    return Drag(edit.name, tuple(handles), tuple(targets), mask, edit.after)


def _first_valid(scene: Scene, propose: Callable[[], Scene]) -> Scene:
    """First valid proposal, or the scene itself after TRIES failures."""
    proposals = (propose() for _ in range(TRIES))
    return next((after for after in proposals if _is_valid(after)), scene)


def _random_step(rng: Random, low: float, high: float) -> Point:
    """Draw a step of `low` to `high` pixels in any direction, in fractions of the image side."""
    length = rng.uniform(low, high) / SIDE
    angle = rng.uniform(0, 2 * np.pi)
    return length * float(np.cos(angle)), length * float(np.sin(angle))


def _random_offset(rng: Random, low: float, high: float) -> float:
    """Draw a signed offset of `low` to `high` pixels, in fractions of the image side."""
    return rng.uniform(low, high) / SIDE * (1 if rng.random() < 0.5 else -1)


def _candidates(scene: Scene, part: Part, *only: str) -> tuple[tuple[Part, str], ...]:
    return tuple((part, grip) for grip in only or _grip_pixels(scene, part))


def _landscape_edits(scene: Scene, rng: Random) -> Iterator[_Edit]:
    """Move the sun or moon, change the height of a peak, shift a peak."""

    def moved_light() -> Scene:
        dx, dy = _random_step(rng, 12, 40)
        return replace(scene, light_x=scene.light_x + dx, light_y=scene.light_y + dy)

    index = int(rng.random() * len(scene.peaks))

    def moved_peak(dx: float, rise: float) -> Scene:
        x, height = scene.peaks[index]
        return scene.with_peak(index, x + dx, height + rise)

    light = ("light", 0)
    peak = ("peak", index)
    name = f"move the {'moon' if scene.time == 'night' else 'sun'}"
    yield _Edit(name, _first_valid(scene, moved_light), (_candidates(scene, light),))
    after = _first_valid(scene, lambda: moved_peak(0, _random_offset(rng, 8, 20)))
    rises = after.peaks[index][1] > scene.peaks[index][1]
    yield _Edit("raise a peak" if rises else "lower a peak", after, (_candidates(scene, peak),))
    after = _first_valid(scene, lambda: moved_peak(_random_offset(rng, 8, 24), 0))
    yield _Edit("shift a peak", after, (_candidates(scene, peak),))


def _object_edits(scene: Scene, index: int, rng: Random) -> Iterator[_Edit]:
    """Move or carry an object, and change its shape."""
    thing = scene.objects[index]
    part = ("object", index)
    label = f"the {thing.color} {thing.kind}"

    def moved() -> Scene:
        dx, dy = _random_step(rng, 8, 30)
        return scene.with_object(index, replace(thing, x=thing.x + dx, y=thing.y + dy))

    after = _first_valid(scene, moved)
    yield _Edit(f"move {label}", after, (_candidates(scene, part),))
    yield _Edit(f"carry {label}", after, (_candidates(scene, part),), carried=part)
    yield from _shape_edits(scene, index, rng, label)


def _shape_edits(scene: Scene, index: int, rng: Random, label: str) -> Iterator[_Edit]:
    """Stretch a box, tree or house; turn the gaze and change the smile of a face."""
    thing = scene.objects[index]
    part = ("object", index)

    def changed(field: str, low: float, high: float, scale: float) -> Scene:
        """Change a shape parameter by `low` to `high` pixels. scale: fraction of the side per unit."""

        def propose() -> Scene:
            value = getattr(thing, field) + _random_offset(rng, low, high) / scale
            return scene.with_object(index, replace(thing, **{field: value}))

        return _first_valid(scene, propose)

    if thing.kind in RISE:
        after = changed("stretch", 8, 24, RISE[thing.kind] * thing.size)
        verb = "stretch" if after.objects[index].stretch > thing.stretch else "shrink"
        top = _candidates(scene, part, "top")
        yield _Edit(f"{verb} {label}", after, (top,))
        yield _Edit(f"{verb} {label}, keep its foot", after, (top, _candidates(scene, part, "foot")))
    if thing.kind == "face":
        after = changed("gaze", 4, 11, LOOK * thing.size)
        pupils = _candidates(scene, part, "left pupil"), _candidates(scene, part, "right pupil")
        yield _Edit(f"turn the gaze of {label}", after, pupils)
        after = changed("smile", 4, 11, SMILE * thing.size)
        verb = "widen" if after.objects[index].smile > thing.smile else "narrow"
        corners = _candidates(scene, part, "left corner"), _candidates(scene, part, "right corner")
        yield _Edit(f"{verb} the smile of {label}", after, corners)


def _with_anchor(scene: Scene, edit: _Edit, index: int) -> _Edit:
    """Add a handle that must stay where it is: on the other object, or on a peak."""
    if len(scene.objects) == 2:
        other = scene.objects[1 - index]
        anchors = _candidates(scene, ("object", 1 - index))
        name = f"{edit.name}, keep the {other.color} {other.kind}"
        return _Edit(name, edit.after, (*edit.candidates, anchors))
    tips = tuple((("peak", peak), "tip") for peak in range(len(scene.peaks)))
    return _Edit(f"{edit.name}, keep a peak", edit.after, (*edit.candidates, tips))


def drags(scene: Scene, rng: Random) -> tuple[Drag, ...]:
    """Draw one drag of every type that the scene allows, with random distances.

    Handles are on the moving part, where it is visible before and after: one handle, or several in "carry"
    drags. In "keep" drags the last handle stays where it is.
    """
    edits = list(_landscape_edits(scene, rng))
    for index in range(len(scene.objects)):
        own = list(_object_edits(scene, index, rng))
        edits += [*own, _with_anchor(scene, own[0], index)]
    labels = layer_map(scene)
    made = [_make_drag(scene, labels, edit) for edit in edits if edit.after != scene]
    return tuple(drag for drag in made if drag is not None)
