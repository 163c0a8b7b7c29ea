"""All exercises, in the order in which they build on each other; numbers are from 1."""

from collections.abc import Sequence
from pathlib import Path

from minidrag.course import diffusion, dragging, networks
from minidrag.course.exercise import Exercise

EXERCISES: tuple[Exercise, ...] = (
    diffusion.DDIM_STEP,
    diffusion.INVERSION,
    dragging.BILINEAR,
    dragging.MOTION_LOSS,
    dragging.TRACKING,
    dragging.BACKGROUND_LOSS,
    diffusion.LORA_FORWARD,
    diffusion.LORA_LOSS,
    networks.KEY_VALUE,
    networks.TIME_EMBEDDING,
    networks.PADDING,
    dragging.ALTERNATION_STEP,
)
STUBS = Path(__file__).parent / "exercises"


def file_name(number: int) -> str:
    """Name of the file of an exercise, 1 to 12."""
    return f"{number:02}_{EXERCISES[number - 1].name}.py"


def check_numbers(numbers: Sequence[int]) -> None:
    """Raise ValueError for a number that no exercise has."""
    for number in numbers:
        if not 1 <= number <= len(EXERCISES):
            raise ValueError(f"there is no exercise {number}: they are 1 to {len(EXERCISES)}")
