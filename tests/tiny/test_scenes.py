"""Scenes: rendering, captions, and the true result of drags."""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageFilter

from minidrag.tiny.objects import COLORS, DRAW, LOOK, RISE, SMILE, Object, grips
from minidrag.tiny.renderer import GROUNDS, PALETTES, SIDE, Scene, layer_map, layers, render
from minidrag.tiny.scenes import EDGE, Drag, caption, drags, random_scene

PIXEL = 1 / SIDE
PLAIN = Scene(
    "day", 0.5, 0.2, ((0.2, 0.2), (0.8, 0.2)), 0.5, "snow", (Object("box", "red", 0.5, 0.875, 0.25),)
)


def some_scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(count)]


@cache
def pixels(scene: Scene, size: int = SIDE) -> np.ndarray:
    return np.asarray(render(scene, size)).astype(int)


def with_object(scene: Scene, thing: Object) -> Scene:
    return replace(scene, objects=(thing,))


@pytest.fixture(scope="module")
def cases() -> list[tuple[Scene, Drag]]:
    rng = np.random.default_rng(1)
    return [(scene, drag) for scene in some_scenes(20, seed=1) for drag in drags(scene, rng)]


def moved_object(scene: Scene, drag: Drag) -> int | None:
    """Index of the object that a drag changes, if any."""
    pairs = zip(scene.objects, drag.after.objects, strict=True)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), None)


def patch(image: np.ndarray, point: tuple[float, float], radius: int) -> np.ndarray:
    """Square around a point, sampled bilinearly."""
    x, y = point
    column, row = int(np.floor(x)), int(np.floor(y))
    right, down = x - column, y - row
    square = image[row - radius : row + radius + 2, column - radius : column + radius + 2].astype(float)
    square = square[:, :-1] * (1 - right) + square[:, 1:] * right
    return square[:-1] * (1 - down) + square[1:] * down


# --- rendering


def test_rendering_is_deterministic():
    for scene, again in zip(some_scenes(20), some_scenes(20), strict=True):
        assert scene == again
        image = render(scene)
        assert (image.mode, image.size) == ("RGB", (SIDE, SIDE))
        assert image.tobytes() == render(again).tobytes()


def test_pixels_computed_by_hand():
    image = pixels(PLAIN)
    # The center of row 0 is 0.5 of 64 pixels down a sky that starts at (88, 156, 228).
    assert image[0, 0].tolist() == [89, 157, 228]
    assert image[25, 64].tolist() == list(PALETTES["day"].light)
    # The ground reaches its near color half an image below the horizon.
    assert image[127, 2].tolist() == list(GROUNDS["snow"][1])
    # The box is 32 pixels wide, from 48 to 80. Its front ends at 73 and is 24 high above the foot at row 112.
    assert image[100, 52].tolist() == [194, 43, 41]  # 0.9 of (216, 48, 46)
    assert image[90, 52].tolist() == [194, 43, 41]
    assert image[100, 78].tolist() == [134, 30, 29]  # 0.62 of it


def test_objects_keep_their_color_at_any_time_of_day():
    for time in PALETTES:
        red, green, blue = pixels(replace(PLAIN, time=time))[100, 52]
        assert red > 2.5 * max(green, blue)
    skies = {time: pixels(replace(PLAIN, time=time))[:30, :30].mean() for time in PALETTES}
    assert skies["day"] > skies["dusk"] > skies["night"]


def test_size_changes_only_the_resolution():
    for scene in some_scenes(5):
        small = np.asarray(render(scene).resize((64, 64), Image.Resampling.BOX)).astype(int)
        assert np.abs(pixels(scene, 64) - small).mean() < 1.0


FACE = Object("face", "blue", 0.5, 0.9, 0.4, gaze=0.2, smile=0.3)
TREE = Object("tree", "green", 0.5, 0.9, 0.3)


@pytest.mark.parametrize(
    "one_pixel",
    [
        lambda t: replace(PLAIN, light_x=0.5 + t * PIXEL),
        lambda t: replace(PLAIN, light_y=0.2 + t * PIXEL),
        lambda t: replace(PLAIN, horizon=0.5 + t * PIXEL),
        lambda t: replace(PLAIN, peaks=((0.2 + t * PIXEL, 0.2), (0.8, 0.2))),
        lambda t: replace(PLAIN, peaks=((0.2, 0.2 + t * PIXEL), (0.8, 0.2))),
        *(lambda t, k=k: with_object(PLAIN, Object(k, "red", 0.4 + t * PIXEL, 0.9, 0.3)) for k in DRAW),
        *(lambda t, k=k: with_object(PLAIN, Object(k, "red", 0.4, 0.9 + t * PIXEL, 0.3)) for k in DRAW),
        *(lambda t, k=k: with_object(PLAIN, Object(k, "red", 0.4, 0.9, 0.3 + t * PIXEL)) for k in DRAW),
        lambda t: with_object(PLAIN, replace(TREE, stretch=1 + t * PIXEL / (0.3 * RISE["tree"]))),
        lambda t: with_object(PLAIN, replace(FACE, gaze=0.2 + t * PIXEL / (0.4 * LOOK))),
        lambda t: with_object(PLAIN, replace(FACE, smile=0.3 + t * PIXEL / (0.4 * SMILE))),
    ],
)
def test_a_shift_by_a_tenth_of_a_pixel_changes_edges_by_a_tenth(one_pixel):
    start, tenth, whole = (pixels(one_pixel(t)) for t in (0.0, 0.1, 1.0))
    change, whole_change = np.abs(tenth - start), np.abs(whole - start)
    # An edge from black to white changes by 26; a corner can add a little.
    assert 0 < change.max() <= 34
    assert 0.05 < change.sum() / whole_change.sum() < 0.2


# --- random scenes and captions

POSITIONS = {"on the left", "in the middle", "on the right"}
PHRASE = rf"an? ({'|'.join(COLORS)}) ({'|'.join(DRAW)}) ({'|'.join(POSITIONS)})"
CAPTION = rf"({PHRASE}(?: and {PHRASE})?), on ({'|'.join(GROUNDS)}), (?:by|at) ({'|'.join(PALETTES)})"


def test_scenes_are_varied_and_captions_describe_them():
    scenes = some_scenes(400)
    positions = set()
    for scene in scenes:
        text = caption(scene)
        assert text == text.lower() and len(text.split()) < 30
        match = re.fullmatch(CAPTION, text)
        assert match and (match[8], match[9]) == (scene.ground, scene.time)
        objects = re.findall(PHRASE, match[1])
        left_to_right = sorted(scene.objects, key=lambda thing: thing.x)
        assert [found[:2] for found in objects] == [(thing.color, thing.kind) for thing in left_to_right]
        positions.update(position for *_, position in objects)
    assert positions == POSITIONS
    assert {scene.time for scene in scenes} == set(PALETTES)
    assert {scene.ground for scene in scenes} == set(GROUNDS)
    assert {thing.kind for scene in scenes for thing in scene.objects} == set(DRAW)
    assert {thing.color for scene in scenes for thing in scene.objects} == set(COLORS)
    assert {len(scene.objects) for scene in scenes} == {1, 2}
    assert {len(scene.peaks) for scene in scenes} == {2, 3}


def test_captions_in_full():
    ball, house = Object("ball", "orange", 0.2, 0.8, 0.3), Object("house", "blue", 0.8, 0.9, 0.3)
    scene = replace(PLAIN, time="dusk", ground="grass", objects=(house, ball))
    assert caption(scene) == "an orange ball on the left and a blue house on the right, on grass, at dusk"
    assert caption(PLAIN) == "a red box in the middle, on snow, by day"


def test_random_module_and_numpy_generators_both_work():
    scene = random_scene(random.Random(3))
    assert scene == random_scene(random.Random(3))
    assert drags(scene, random.Random(4)) == drags(scene, random.Random(4))


def test_objects_overlap_but_stay_partly_visible():
    hidden = []
    for scene in some_scenes(100):
        shown, order = layer_map(scene), [part for part, _ in layers(scene)]
        for index, thing in enumerate(scene.objects):
            alone = with_object(scene, thing)
            whole = (layer_map(alone) == len(layers(alone)) - 1).sum()
            hidden.append(1 - (shown == order.index(("object", index))).sum() / whole)
    assert 0.3 < max(hidden) < 0.9


# --- drags


def test_every_type_of_drag_occurs(cases):
    verbs, moving = {drag.name.split()[0] for _, drag in cases}, {"move", "carry"}
    assert verbs == moving | {"shift", "raise", "lower", "stretch", "shrink", "turn", "widen", "narrow"}
    names = " / ".join(drag.name for _, drag in cases)
    assert all(text in names for text in ("the sun", "the moon", "keep the", "keep a peak", "keep its foot"))
    assert {len(drag.handles) for _, drag in cases if not drag.name.startswith("carry")} == {1, 2}


def test_carry_handles_are_spread_over_the_object(cases):
    counts = []
    for scene, drag in cases:
        if not drag.name.startswith("carry"):
            continue
        counts.append(len(drag.handles))
        index, steps = moved_object(scene, drag), np.array(drag.targets) - np.array(drag.handles)
        assert index is not None and np.allclose(steps, steps[0])
        for end, points in ((scene, drag.handles), (drag.after, drag.targets)):
            shown = layer_map(end) == [part for part, _ in layers(end)].index(("object", index))
            assert all(shown[round(y), round(x)] for x, y in points), drag.name
        distances = [math.dist(*pair) for pair in itertools.combinations(drag.handles, 2)]
        assert not distances or min(distances) >= 4
        (move,) = [
            other
            for _, other in cases
            if other.name == drag.name.replace("carry", "move") and other.after is drag.after
        ]
        assert move.handles[0] == drag.handles[0] and move.targets[0] == drag.targets[0]
    assert counts.count(5) > 0.8 * len(counts)


def test_drags_have_unique_names_and_depend_only_on_the_seed():
    for scene in some_scenes(3):
        once, again = (drags(scene, np.random.default_rng(5)) for _ in range(2))
        assert once == again
        assert len({drag.name for drag in once}) == len(once)


def test_the_result_differs_only_inside_the_mask(cases):
    for scene, drag in cases:
        mask = np.asarray(drag.mask)
        assert drag.mask.mode == "L" and mask.shape == (SIDE, SIDE) and set(np.unique(mask)) == {0, 255}
        changed = (pixels(scene) != pixels(drag.after)).any(axis=-1)
        assert changed.any(), drag.name
        around = Image.fromarray(changed.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(5))
        assert (mask[np.asarray(around) > 0] == 255).all(), drag.name
        assert (mask == 255).mean() < 0.6, drag.name


def test_the_mask_covers_a_moving_object_before_and_after(cases):
    for scene, drag in cases:
        index = moved_object(scene, drag)
        if drag.name.startswith(("move", "carry")) and index is not None:
            for end in (scene, drag.after):
                layer = [part for part, _ in layers(end)].index(("object", index))
                assert (np.asarray(drag.mask)[layer_map(end) == layer] == 255).all(), drag.name


def test_handles_and_targets_are_inside_the_mask_and_away_from_the_border(cases):
    for _, drag in cases:
        assert len(drag.handles) == len(drag.targets)
        for x, y in (*drag.handles, *drag.targets):
            assert min(x, y) >= EDGE and max(x, y) <= SIDE - 1 - EDGE, drag.name
            assert drag.mask.getpixel((round(x), round(y))) == 255, drag.name


def test_the_handle_is_on_the_moving_object(cases):
    for scene, drag in cases:
        index = moved_object(scene, drag)
        if index is None:
            continue
        without = replace(scene, objects=scene.objects[:index] + scene.objects[index + 1 :])
        x, y = (round(value) for value in drag.handles[0])
        assert np.abs(pixels(scene)[y, x] - pixels(without)[y, x]).max() > 8, drag.name


def test_the_target_looks_like_the_handle(cases):
    for scene, drag in cases:
        before, after = pixels(scene), pixels(drag.after)
        ends = list(zip(drag.handles, drag.targets, strict=True))
        if drag.name.startswith("carry"):
            ends = ends[:1]  # the grip; the other handles may be on an edge within the object
        for handle, target in ends:
            # A patch keeps its appearance only if it moves rigidly.
            radius = 1 if drag.name.startswith(("move", "carry")) else 0
            error = np.abs(patch(before, handle, radius) - patch(after, target, radius)).mean()
            assert error < 12, drag.name


def test_handles_move_in_the_direction_of_the_name(cases):
    for _, drag in cases:
        steps = np.array(drag.targets) - np.array(drag.handles)
        dx, dy = steps[0]
        assert 4 <= np.hypot(dx, dy) <= 40.5, drag.name
        if "keep" in drag.name:
            assert len(steps) == 2 and not steps[1].any()
        verb = drag.name.split()[0]
        assert verb not in ("raise", "stretch") or (abs(dx) < 1e-3 and dy < 0)
        assert verb not in ("lower", "shrink") or (abs(dx) < 1e-3 and dy > 0)
        assert verb != "shift" or abs(dy) < 1e-3
        assert verb != "turn" or np.allclose(steps[0], steps[1])
        assert verb not in ("widen", "narrow") or np.allclose(steps[0], -steps[1])
        assert verb != "widen" or dx < 0


def test_a_drag_changes_one_part(cases):
    for scene, drag in cases:
        same_light = (scene.light_x, scene.light_y) == (drag.after.light_x, drag.after.light_y)
        peaks = sum(one != other for one, other in zip(scene.peaks, drag.after.peaks, strict=True))
        things = sum(one != other for one, other in zip(scene.objects, drag.after.objects, strict=True))
        assert (not same_light) + peaks + things == 1
        assert scene.ground == drag.after.ground and scene.horizon == drag.after.horizon


def test_hidden_objects_get_no_handle():
    ball = Object("ball", "red", 0.5, 0.8, 0.3)
    house = Object("house", "blue", 0.5, 0.9, 0.4)
    hidden = replace(PLAIN, objects=(ball, house))
    assert not any(drag.name.startswith("move the red") for drag in drags(hidden, random.Random(0)))


def test_grips_are_on_the_object():
    for kind in DRAW:
        thing = Object(kind, "red", 0.5, 0.9, 0.4)
        scene = with_object(PLAIN, thing)
        shown = layer_map(scene)
        for u, v in grips(thing).values():
            row, column = round((0.9 - v * 0.4) * SIDE - 0.5), round((0.5 + u * 0.4) * SIDE - 0.5)
            assert shown[row, column] == len(layers(scene)) - 1
