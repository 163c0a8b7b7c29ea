"""Constants of an edit, each with its source.

The defaults are what measured best (minidrag/bench/README.md); a comment names the paper's value where it is
another. "Paper" is arXiv 2306.14435, whose sections are in parentheses; "code" is its authors' program;
GoodDrag is arXiv 2404.07206.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class EditConfig:
    """Constants of an edit. Raises ValueError for a value out of range."""

    steps: int = 20  # DDIM steps from noise to image; paper: 50 (4)
    inversion_steps: int = 14  # of them, up to the noise that is dragged, t = 651; paper: 35, t = 681 (4)
    block: int = 3  # up block of the UNet, 1 to 4; the third has 640 channels at 64x64 (4)
    warp_start: bool = True  # first move the objects under the handles in the latent (FastDrag)
    drag_levels: int = 7  # noise levels that are dragged (GoodDrag); paper: 1
    drag_steps: int = 6  # updates at each level, at most; paper: 80 (4)
    hold_steps: int = 3  # updates at each level, at least: they hold what has arrived; paper: 0
    drag_lr: float = 0.04  # of Adam on the latent; paper: 0.01 (4)
    motion_radius: int = 4  # r_1 in cells (GoodDrag); paper: 1, patches of 3x3 cells (4)
    motion_step: float = 4.0  # length of d_i in cells (GoodDrag); paper: 1 (eq. 3)
    motion_reference: str = "start"  # patch as in the original (GoodDrag) or, "moving", as it is now (eq. 3)
    motion_loss: str = "mean"  # over channels and patch, times the area (code); "sum" (eq. 3)
    track_radius: int = 12  # r_2 in cells (GoodDrag); paper: 3, windows of 7x7 cells (4)
    scale_radii: bool = True  # r_1, r_2, and d_i are for a grid 256 wide: see `scaled`; paper: False
    mask_weight: float = 0.2  # lambda (GoodDrag); paper: 0.1 (4)
    tolerance: float = 1.0  # cells at which a handle has arrived; 2 in the authors' program
    lora_rank: int = 16  # (4)
    lora_targets: str = "qk"  # projections of all attention modules; paper: qkv (4.1), code: qkvo
    lora_steps: int = 40  # paper: 80 (4)
    lora_batch: int = 2  # paper: 4 (4)
    lora_lr: float = 5e-4  # of AdamW (4)
    lora_lr_ratio: float = 8.0  # learning rate of up over that of down (LoRA+, arXiv 2402.12354); paper: 1
    control_start: int = 0  # first denoising step that reads the original's keys and values (4.1)
    control_blocks: int = 2  # last up blocks that do (code); paper: 3, all that have attention (4.1)
    size: int | None = None  # shorter side to work at; None: the model's own, 512 for SD 1.5
    keep_background: bool = True  # keep the original's pixels in the unmasked region; not in the paper
    checkpointing: bool = False  # recompute activations: less memory, more time; not in the paper

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS | {"inversion_steps": (1, self.steps)})
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def scaled(self, grid: tuple[int, int]) -> "EditConfig":
        """Bring the radii and the step from the grid of a 512x512 image, 256 wide, to another.

        They shrink with the square root of the width: on a grid a quarter as wide, objects are a quarter as
        wide, but what the features of a cell describe is as wide as before. Half is the mean of both.
        """
        if not self.scale_radii:
            return self
        factor = (min(grid) / 256) ** 0.5
        radii = {name: round(factor * getattr(self, name)) for name in ("motion_radius", "track_radius")}
        return replace(self, **radii, motion_step=factor * self.motion_step, scale_radii=False)

    @property
    def most_updates(self) -> int:
        """Largest number of drag updates."""
        return self.drag_levels * self.drag_steps

    @classmethod
    def paper(cls) -> "EditConfig":
        """The paper to the letter."""
        return cls(
            **PAPER,
            # Hundreds of times larger than the mean, so that the mask term hardly holds the background.
            motion_loss="sum",  # (eq. 3)
            lora_targets="qkv",  # (4.1); the course notes that this project began with say qk
            control_blocks=3,  # (4.1)
        )

    @classmethod
    def official(cls) -> "EditConfig":
        """The authors' program."""
        return cls(**PAPER, lora_targets="qkvo")

    @classmethod
    def fast(cls) -> "EditConfig":
        """The default without a LoRA."""
        return cls(lora_steps=0)


def check_bounds(values: object, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raise ValueError for an attribute that is not between its bounds; NaN never is."""
    for name, (least, most) in bounds.items():
        value = getattr(values, name)
        if value is not None and not least <= value <= most:
            bound = f"at most {most}" if value > most else f"at least {least}"
            raise ValueError(f"{name} must be {bound}, got {value}")


PAPER: dict[str, Any] = {  # what the paper and the authors' program agree on and the defaults do not
    "steps": 50,
    "inversion_steps": 35,
    "warp_start": False,
    "drag_levels": 1,
    "drag_steps": 80,
    "hold_steps": 0,
    "drag_lr": 0.01,
    "motion_radius": 1,
    "motion_step": 1.0,
    "motion_reference": "moving",
    "track_radius": 3,
    "scale_radii": False,
    "mask_weight": 0.1,
    "tolerance": 2.0,
    "lora_steps": 80,
    "lora_batch": 4,
    "lora_lr_ratio": 1.0,
    "keep_background": False,
}
MOST = 1_000_000  # larger than any sensible value
BOUNDS = {  # least and most
    **dict.fromkeys(("drag_steps", "hold_steps", "drag_lr", "motion_radius", "motion_step"), (0, MOST)),
    **dict.fromkeys(("track_radius", "control_start"), (0, MOST)),
    **dict.fromkeys(("mask_weight", "tolerance", "lora_steps", "lora_lr", "lora_lr_ratio"), (0, MOST)),
    **dict.fromkeys(("steps", "drag_levels", "lora_rank"), (1, MOST)),
    "lora_batch": (1, 1000),  # more needs so much memory that the system kills the process
    "block": (1, 4),
    "control_blocks": (0, 4),
    "size": (8, MOST),
}
CHOICES = {
    "motion_reference": ("moving", "start"),
    "motion_loss": ("sum", "mean"),
    "lora_targets": ("qk", "qkv", "qkvo"),
}
