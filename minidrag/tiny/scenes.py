"""Scenes by chance, their captions, and drags whose true result is known.

A drag's truth is again a scene that `random_scene` could have made, so a model that was trained on such
scenes has seen its like.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from minidrag.tiny.picture import AIRS, GROUNDS, SIDE, Part, Scene, layers, owners, render
from minidrag.tiny.things import COLORS, DRAW, LOOK, RISE, SMILE, Array, Object, grips

__all__ = [
    "AIRS",
    "COLORS",
    "DRAW",
    "GROUNDS",
    "SIDE",
    "Drag",
    "Names",
    "Object",
    "Scene",
    "caption",
    "drags",
    "names",
    "parse",
    "random_scene",
    "render",
]

Random = random.Random | np.random.Generator
Point = tuple[float, float]

LIGHT_X, LIGHT_Y = (0.12, 0.88), (0.11, 0.26)
PEAK_X, PEAK_HEIGHT = (0.08, 0.92), (0.12, 0.30)
STRETCH = (0.75, 1.4)
BESIDE, BELOW = 0.06, 0.05  # what an object keeps from the sides of the picture, and from the horizon
LOWEST = 0.95  # where its foot may be at most


def _pick(rng: Random, choices: Sequence[str]) -> str:
    return choices[int(rng.random() * len(choices))]


def _random_object(rng: Random, horizon: float, color: str) -> Object:
    kind = _pick(rng, tuple(DRAW))
    size = rng.uniform(0.32, 0.46) if kind == "face" else rng.uniform(0.22, 0.40)
    return Object(
        kind,
        color,
        x=rng.uniform(BESIDE + size / 2, 1 - BESIDE - size / 2),
        y=rng.uniform(horizon + BELOW, LOWEST),
        size=size,
        stretch=rng.uniform(*STRETCH) if kind in RISE else 1.0,
        gaze=rng.uniform(-1, 1) if kind == "face" else 0.0,
        smile=rng.uniform(0, 1) if kind == "face" else 0.0,
    )


def _apart(one: Object, other: Object) -> bool:
    """Whether a part of each shows at its side, however much the nearer one hides."""
    return abs(one.x - other.x) > 0.3 * (one.size + other.size)


def random_scene(rng: Random) -> Scene:
    """A scene of one object, or two of different colours that do not hide each other wholly."""
    horizon = rng.uniform(0.46, 0.68)
    colors = list(COLORS)
    objects = [_random_object(rng, horizon, colors.pop(int(rng.random() * len(colors))))]
    second_color = _pick(rng, colors)
    wanted = 1 if rng.random() < 0.4 else 2
    while len(objects) < wanted:
        thing = _random_object(rng, horizon, second_color)
        if _apart(thing, objects[0]):
            objects.append(thing)
    starts = (0.2, 0.5, 0.8) if rng.random() < 0.5 else (0.28, 0.72)
    return Scene(
        peaks=tuple((x + rng.uniform(-0.12, 0.12), rng.uniform(*PEAK_HEIGHT)) for x in starts),
        time=_pick(rng, tuple(AIRS)),
        light_x=rng.uniform(*LIGHT_X),
        light_y=rng.uniform(*LIGHT_Y),
        horizon=horizon,
        ground=_pick(rng, tuple(GROUNDS)),
        objects=tuple(objects),
    )


def _possible(scene: Scene) -> bool:
    """Whether `random_scene` could have made the scene."""

    def within(value: float, limits: tuple[float, float]) -> bool:
        return limits[0] <= value <= limits[1]

    return (
        within(scene.light_x, LIGHT_X)
        and within(scene.light_y, LIGHT_Y)
        and all(within(x, PEAK_X) and within(height, PEAK_HEIGHT) for x, height in scene.peaks)
        and all(_apart(one, other) for one, other in zip(scene.objects, scene.objects[1:], strict=False))
        and all(
            within(thing.x, (BESIDE + thing.size / 2, 1 - BESIDE - thing.size / 2))
            and within(thing.y, (scene.horizon + BELOW, LOWEST))
            and (thing.kind not in RISE or within(thing.stretch, STRETCH))
            and within(thing.gaze, (-1, 1))
            and within(thing.smile, (0, 1))
            for thing in scene.objects
        )
    )


@dataclass(frozen=True)
class Names:
    """What a caption says: objects are (color, kind, place) from left to right."""

    time: str
    ground: str
    objects: tuple[tuple[str, str, str], ...]


def names(scene: Scene) -> Names:
    """The names of a scene, as its caption gives them."""
    places = ("on the left", "in the middle", "on the right")
    ordered = sorted(scene.objects, key=lambda thing: thing.x)
    objects = tuple((thing.color, thing.kind, places[min(2, int(thing.x * 3))]) for thing in ordered)
    return Names(scene.time, scene.ground, objects)


def caption(scene: Scene) -> str:
    """One line such as "a red ball on the left and a blue house on the right, on grass, at dusk"."""
    said = names(scene)
    things = [
        f"{'an' if color == 'orange' else 'a'} {color} {kind} {place}" for color, kind, place in said.objects
    ]
    return f"{' and '.join(things)}, on {said.ground}, {AIRS[said.time].words}"


def parse(text: str) -> Names:
    """The names that a caption holds; ValueError where it is not one of this grammar's."""
    one = rf"an? ({'|'.join(COLORS)}) ({'|'.join(DRAW)}) (on the left|in the middle|on the right)"
    times = {air.words: time for time, air in AIRS.items()}
    match = re.fullmatch(rf"({one}(?: and {one})?), on ({'|'.join(GROUNDS)}), ({'|'.join(times)})", text)
    if match is None:
        raise ValueError(f"not a caption of a scene: {text!r}")
    return Names(times[match[9]], match[8], tuple(re.findall(one, match[1])))


@dataclass(frozen=True)
class Drag:
    """An edit of a scene and its truth.

    name: begins with what is done (move, carry, shift, raise, lower, stretch, shrink, turn, widen, narrow).
    handles, targets: (x, y) in pixels of the 128 x 128 picture; (0, 0) is the middle of its first pixel.
    mask: mode "L", 255 where the picture may change; the truth differs nowhere else.
    after: the scene that a perfect edit would show.
    """

    name: str
    handles: tuple[Point, ...]
    targets: tuple[Point, ...]
    mask: Image.Image
    after: Scene


@dataclass(frozen=True)
class _Edit:
    """A drag in the making: for each handle the spots (part, grip) to take it from, the best first.

    carried: the part that gets handles all over.
    """

    name: str
    after: Scene
    spots: tuple[tuple[tuple[Part, str], ...], ...]
    carried: Part | None = None


EDGE = 6  # pixels that handles and targets keep from the picture's border
MARGIN = 4  # pixels by which a mask exceeds what changes
HELD = 5  # handles on a thing that is carried
DEPTH = 4  # pixels that all but the first of them keep from its outline, and from each other
TRIES = 40


def _grips(scene: Scene, part: Part) -> dict[str, Point]:
    """The grips of any part of a scene, in pixels."""
    kind, index = part
    if kind == "light":
        offsets = {"middle": 0.0, "left": -0.04, "right": 0.04}
        found = {grip: (scene.light_x + offset, scene.light_y) for grip, offset in offsets.items()}
    elif kind == "peak":
        x, height = scene.peaks[index]
        found = {"tip": (x, scene.horizon - height + 0.03)}
    else:
        thing = scene.objects[index]
        found = {
            grip: (thing.x + u * thing.size, thing.y - v * thing.size)
            for grip, (u, v) in grips(thing).items()
        }
    return {grip: (x * SIDE - 0.5, y * SIDE - 0.5) for grip, (x, y) in found.items()}


def _visible(scene: Scene, owner: Array, part: Part, point: Point) -> bool:
    """Whether a part of the scene shows at a point and two pixels around it, off the border."""
    column, row = round(point[0]), round(point[1])
    if min(point) < EDGE or max(point) > SIDE - 1 - EDGE:
        return False
    place = [drawn for drawn, _ in layers(scene)].index(part)
    around = owner[[row, row - 2, row + 2, row, row], [column, column, column, column - 2, column + 2]]
    return bool((around == place).all())


def _mask(before: Image.Image, after: Image.Image, points: Sequence[Point]) -> Image.Image:
    """The convex hull of all that changes and of the points, with a margin: what a user would paint."""
    changed = (np.asarray(before) != np.asarray(after)).any(axis=-1)
    rows, columns = np.nonzero(changed)
    x, y = np.concatenate([np.array(points), np.stack([columns, rows], axis=1)]).T
    column, row = np.arange(SIDE), np.arange(SIDE)[:, None]
    inside = np.ones((SIDE, SIDE), dtype=bool)
    for angle in np.linspace(0, 2 * np.pi, 32, endpoint=False):
        across, down = np.cos(angle), np.sin(angle)
        inside &= column * across + row * down <= (x * across + y * down).max() + MARGIN
    return Image.fromarray(inside.astype(np.uint8) * 255)


def _inner(scene: Scene, owner: Array, part: Part) -> Array:
    """Where a part shows, but for what lies near its outline or the picture's border: (SIDE, SIDE), bool."""
    shown = Image.fromarray(owner == [drawn for drawn, _ in layers(scene)].index(part)).convert("L")
    deep = np.asarray(shown.filter(ImageFilter.MinFilter(2 * DEPTH + 1))) > 0
    return deep & np.pad(np.ones((SIDE - 2 * EDGE - 2,) * 2, dtype=bool), EDGE + 1)


def _spread(before: Array, after: Array, handle: Point, target: Point) -> tuple[list[Point], list[Point]]:
    """Handles all over a thing that moves as a whole, the first of them given, and their targets.

    Each is as far as can be from those ahead of it. before, after: where handles and targets may be.
    """
    right, down = target[0] - handle[0], target[1] - handle[1]
    spots = np.argwhere(before & np.roll(after, (-round(down), -round(right)), axis=(0, 1)))[:, ::-1]
    handles = [handle]
    while len(handles) < HELD and len(spots):
        away = np.min([np.hypot(*(spots - one).T) for one in handles], axis=0)
        if away.max() < DEPTH:
            break
        handles.append(tuple(spots[away.argmax()].astype(float).tolist()))
    return handles, [(x + right, y + down) for x, y in handles]


def _drag(scene: Scene, owner: Array, edit: _Edit) -> Drag | None:
    """Take each handle where it shows, before and after; None if one does not. owner: `owners(scene)`."""
    owner_after = owners(edit.after)
    handles, targets = [], []
    for spots in edit.spots:
        for part, grip in spots:
            handle, target = _grips(scene, part)[grip], _grips(edit.after, part)[grip]
            if _visible(scene, owner, part, handle) and _visible(edit.after, owner_after, part, target):
                handles.append(handle)
                targets.append(target)
                break
        else:
            return None
    if edit.carried:
        both = _inner(scene, owner, edit.carried), _inner(edit.after, owner_after, edit.carried)
        handles, targets = _spread(*both, handles[0], targets[0])
    mask = _mask(render(scene), render(edit.after), [*handles, *targets])
    return Drag(edit.name, tuple(handles), tuple(targets), mask, edit.after)


def _try(scene: Scene, propose: Callable[[], Scene]) -> Scene:
    """The first of some proposals that is possible, or else the scene itself."""
    proposals = (propose() for _ in range(TRIES))
    return next((after for after in proposals if _possible(after)), scene)


def _step(rng: Random, low: float, high: float) -> Point:
    """A step in any direction, its length between the two given in pixels, as fractions of the side."""
    length, angle = rng.uniform(low, high) / SIDE, rng.uniform(0, 2 * np.pi)
    return length * float(np.cos(angle)), length * float(np.sin(angle))


def _signed(rng: Random, low: float, high: float) -> float:
    """A length between the two given in pixels, up or down, as a fraction of the side."""
    return rng.uniform(low, high) / SIDE * (1 if rng.random() < 0.5 else -1)


def _spots(scene: Scene, part: Part, *only: str) -> tuple[tuple[Part, str], ...]:
    return tuple((part, grip) for grip in only or _grips(scene, part))


def _land_edits(scene: Scene, rng: Random) -> Iterator[_Edit]:
    """Move the sun or moon; raise or lower a peak, and shift it."""

    def moved_light() -> Scene:
        dx, dy = _step(rng, 12, 40)
        return replace(scene, light_x=scene.light_x + dx, light_y=scene.light_y + dy)

    index = int(rng.random() * len(scene.peaks))

    def moved_peak(dx: float, rise: float) -> Scene:
        x, height = scene.peaks[index]
        peaks = (*scene.peaks[:index], (x + dx, height + rise), *scene.peaks[index + 1 :])
        return replace(scene, peaks=peaks)

    light, peak = ("light", 0), ("peak", index)
    name = f"move the {'moon' if scene.time == 'night' else 'sun'}"
    yield _Edit(name, _try(scene, moved_light), (_spots(scene, light),))
    after = _try(scene, lambda: moved_peak(0, _signed(rng, 8, 20)))
    rises = after.peaks[index][1] > scene.peaks[index][1]
    yield _Edit("raise a peak" if rises else "lower a peak", after, (_spots(scene, peak),))
    after = _try(scene, lambda: moved_peak(_signed(rng, 8, 24), 0))
    yield _Edit("shift a peak", after, (_spots(scene, peak),))


def _object_edits(scene: Scene, index: int, rng: Random) -> Iterator[_Edit]:
    """Move or carry an object; stretch a box, tree or house; turn the gaze or change the smile of a face."""
    thing, part = scene.objects[index], ("object", index)
    label, unit = f"the {thing.color} {thing.kind}", thing.size

    def changed(new: Object) -> Scene:
        return replace(scene, objects=(*scene.objects[:index], new, *scene.objects[index + 1 :]))

    def moved() -> Scene:
        dx, dy = _step(rng, 8, 30)
        return changed(replace(thing, x=thing.x + dx, y=thing.y + dy))

    after = _try(scene, moved)
    yield _Edit(f"move {label}", after, (_spots(scene, part),))
    yield _Edit(f"carry {label}", after, (_spots(scene, part),), carried=part)
    if thing.kind in RISE:
        rise = RISE[thing.kind] * unit
        after = _try(
            scene, lambda: changed(replace(thing, stretch=thing.stretch + _signed(rng, 8, 24) / rise))
        )
        verb = "stretch" if after.objects[index].stretch > thing.stretch else "shrink"
        top, foot = _spots(scene, part, "top"), _spots(scene, part, "foot")
        yield _Edit(f"{verb} {label}", after, (top,))
        yield _Edit(f"{verb} {label}, keep its foot", after, (top, foot))
    if thing.kind == "face":
        after = _try(
            scene, lambda: changed(replace(thing, gaze=thing.gaze + _signed(rng, 4, 11) / (LOOK * unit)))
        )
        pupils = _spots(scene, part, "left pupil"), _spots(scene, part, "right pupil")
        yield _Edit(f"turn the gaze of {label}", after, pupils)
        after = _try(
            scene, lambda: changed(replace(thing, smile=thing.smile + _signed(rng, 4, 11) / (SMILE * unit)))
        )
        verb = "widen" if after.objects[index].smile > thing.smile else "narrow"
        corners = _spots(scene, part, "left corner"), _spots(scene, part, "right corner")
        yield _Edit(f"{verb} the smile of {label}", after, corners)


def _kept(scene: Scene, edit: _Edit, index: int) -> _Edit:
    """The edit of an object with a second handle that stays: on the other object, or on a mountain."""
    if len(scene.objects) == 2:
        other = scene.objects[1 - index]
        spots = _spots(scene, ("object", 1 - index))
        return _Edit(f"{edit.name}, keep the {other.color} {other.kind}", edit.after, (*edit.spots, spots))
    tips = tuple((("peak", place), "tip") for place in range(len(scene.peaks)))
    return _Edit(f"{edit.name}, keep a peak", edit.after, (*edit.spots, tips))


def drags(scene: Scene, rng: Random) -> tuple[Drag, ...]:
    """All the edits that make sense for a scene, each with its truth; how far they go is drawn by chance.

    Handles lie on what moves, where it is seen before and after: one, or several on a thing that is carried.
    In "keep" edits, the last handle stays.
    """
    edits = list(_land_edits(scene, rng))
    for index in range(len(scene.objects)):
        own = list(_object_edits(scene, index, rng))
        edits += [*own, _kept(scene, own[0], index)]
    owner = owners(scene)
    made = [_drag(scene, owner, edit) for edit in edits if edit.after != scene]
    return tuple(drag for drag in made if drag is not None)
