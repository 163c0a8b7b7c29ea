"""Settings of an edit, one line each, with help, bounds, and sources.

A default is what measured best (minidrag/bench/README.md). `paper` is arXiv 2306.14435, whose sections are in
parentheses; `official` and "code" are its authors' program; GoodDrag is arXiv 2404.07206.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

MOST = 1_000_000  # larger than any sensible value
INVERTED = 0.7  # of the steps (4)


def setting(default: Any, help: str, **about: Any) -> Any:
    """Describe a setting.

    about: `paper`, the paper's value, where it is another; `official`, the authors' program's, where it is
    not the paper's; `least` and `most`, bounds of a number; `choices` of a word.
    """
    return field(default=default, metadata={"help": help} | about)


@dataclass(frozen=True)
class EditConfig:
    """Settings of an edit. Raises ValueError for a value out of range."""

    steps: int = setting(20, "DDIM steps from noise to image", least=1, paper=50)  # (4)
    # Read it as `levels`: 14 of 20, t = 651, or 35 of 50, t = 681 (4).
    inversion_steps: int | None = setting(
        None, "DDIM steps up to the dragged latent (default: 0.7 of all steps)", least=1
    )
    # The third has 640 channels at 64x64 (4).
    block: int = setting(3, "up block of the UNet whose features are used, 1 to 4", least=1, most=4)
    # FastDrag.
    warp_start: bool = setting(True, "first move the objects under the handles in the latent", paper=False)
    drag_levels: int = setting(7, "noise levels that are dragged", least=1, paper=1)  # GoodDrag
    drag_steps: int = setting(6, "most updates at each level: more for far drags", paper=80)  # (4)
    hold_steps: int = setting(3, "least updates at each level: they hold what has arrived", paper=0)
    # Adam on the latent (4).
    drag_lr: float = setting(0.04, "learning rate of the drag: higher is faster and rougher", paper=0.01)
    # r_1 (GoodDrag); 3x3 cells (4).
    motion_radius: int = setting(4, "radius of the supervised patch, in cells of 2 working pixels", paper=1)
    # Length of d_i (GoodDrag; eq. 3).
    motion_step: float = setting(4.0, "distance that an update pulls the patch ahead, in cells", paper=1.0)
    # The patch as in the original (GoodDrag) or as it is now (eq. 3).
    motion_reference: str = setting(
        "start",
        "what the patch is compared with: moving, itself; start, the original",
        choices=("moving", "start"),
        paper="moving",
    )
    # Mean over channels and patch, times the area (code), or the sum (eq. 3), which is hundreds of times
    # larger, so that the mask term hardly holds the background.
    motion_loss: str = setting(
        "mean",
        "sum or mean over the features of the patch",
        choices=("sum", "mean"),
        paper="sum",
        official="mean",
    )
    # r_2 (GoodDrag); 7x7 cells (4).
    track_radius: int = setting(12, "radius of the window in which a handle is tracked, in cells", paper=3)
    scale_radii: bool = setting(
        True,
        "radii and step are for a grid 256 wide, and shrink with the square root of the width",
        paper=False,
    )
    # lambda (GoodDrag; 4).
    mask_weight: float = setting(
        0.2, "weight of the background loss, which keeps the unmasked region", paper=0.1
    )
    # 2 (code).
    tolerance: float = setting(1.0, "distance at which a handle has arrived, in cells", paper=2.0)
    lora_rank: int = setting(16, "rank of the LoRA", least=1)  # (4)
    # Of all attention modules (4.1; code); the course notes that this project began with say qk.
    lora_targets: str = setting(
        "qk",
        "attention projections to train: qk, qkv, or qkvo",
        choices=("qk", "qkv", "qkvo"),
        paper="qkv",
        official="qkvo",
    )
    # (4)
    lora_steps: int = setting(
        40, "LoRA training steps: fewer are faster but preserve the image's identity less", paper=80
    )
    # (4); more than 1,000 need so much memory that the system kills the process.
    lora_batch: int = setting(
        2, "samples per training step: fewer need less memory", least=1, most=1000, paper=4
    )
    lora_lr: float = setting(5e-4, "learning rate of the LoRA")  # AdamW (4)
    # LoRA+, arXiv 2402.12354.
    lora_lr_ratio: float = setting(8.0, "learning rate of up over that of down (LoRA+)", paper=1.0)
    # (4.1)
    control_start: int = setting(
        0, "first denoising step in which the edit reads the original's keys and values"
    )
    # All that have attention (4.1); two (code).
    control_blocks: int = setting(
        2,
        "number of last up blocks in which the edit reads the original's keys and values",
        most=4,
        paper=3,
        official=2,
    )
    size: int | None = setting(
        None, "shorter side to work at, in pixels (default: what the model was trained on)", least=8
    )
    keep_background: bool = setting(True, "keep the original's pixels in the unmasked region", paper=False)
    window: bool = setting(True, "edit a window around mask and points, not the whole image", paper=False)
    detail: bool = setting(
        True, "carry the original's pixels into the edit where they explain it", paper=False
    )
    checkpointing: bool = setting(False, "recompute activations: less memory, more time")

    def __post_init__(self) -> None:
        bounds = {
            entry.name: (entry.metadata.get("least", 0), entry.metadata.get("most", MOST))
            for entry in fields(self)
            if entry.type in (int, float, int | None)
        }
        check_bounds(self, bounds)
        if not 1 <= self.levels <= self.steps:
            steps = f"1 to {self.steps}, the steps, got {self.inversion_steps}"
            raise ValueError(f"inversion_steps must be {steps}")
        for entry in fields(self):
            value = getattr(self, entry.name)
            choices = entry.metadata.get("choices", (value,))
            if value not in choices:
                raise ValueError(f"{entry.name} must be one of {', '.join(choices)}, got {value!r}")

    @property
    def levels(self) -> int:
        """Number of inverted steps, and thus the highest level."""
        if self.inversion_steps is None:
            return max(1, round(INVERTED * self.steps))
        return self.inversion_steps

    @property
    def most_updates(self) -> int:
        """Largest number of drag updates."""
        return self.drag_levels * self.drag_steps

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

    @classmethod
    def paper(cls) -> "EditConfig":
        """The paper to the letter."""
        return cls(**values_of("paper"))

    @classmethod
    def official(cls) -> "EditConfig":
        """The authors' program."""
        return cls(**values_of("paper", "official"))

    @classmethod
    def fast(cls) -> "EditConfig":
        """The default without a LoRA."""
        return cls(lora_steps=0)


def values_of(*sources: str) -> dict[str, Any]:
    """Values in which sources differ from the defaults, the later ones first."""
    values = [(entry.name, entry.metadata) for entry in fields(EditConfig)]
    return {name: about[source] for name, about in values for source in sources if source in about}


def check_bounds(values: object, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raise ValueError for an attribute that is not between its bounds; NaN never is."""
    for name, (least, most) in bounds.items():
        value = getattr(values, name)
        if value is not None and not least <= value <= most:
            bound = f"at most {most}" if value > most else f"at least {least}"
            raise ValueError(f"{name} must be {bound}, got {value}")
