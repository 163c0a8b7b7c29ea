"""Constants of an edit, each with its source.

The defaults differ from the paper's in four fields: motion_loss, which measurements decided, lora_targets,
control_blocks, and keep_background. "Paper" is arXiv 2306.14435, whose sections are in parentheses; "code" is
its authors' program.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class EditConfig:
    """Constants of an edit. Raises ValueError for a value out of range."""

    steps: int = 50  # DDIM steps from noise to image (4)
    inversion_steps: int = 35  # of them, from the image up to the latent that is dragged: t = 681 (4)
    block: int = 3  # up block of the UNet, 1 to 4; the third has 640 channels at 64x64 (4)
    drag_steps: int = 80  # updates, at most (4)
    drag_lr: float = 0.01  # of Adam on the latent (4)
    motion_radius: int = 1  # r_1: supervised patches are 3x3 cells (4)
    motion_step: float = 1.0  # length of d_i in cells (eq. 3)
    motion_reference: str = "moving"  # patch as it is now (eq. 3) or, "start", as in the original
    motion_loss: str = "mean"  # over channels and patch, times the area (code); "sum" (eq. 3)
    track_radius: int = 3  # r_2: the search window is 7x7 cells (4)
    mask_weight: float = 0.1  # lambda (4)
    tolerance: float = 2.0  # cells at which a handle has arrived (code)
    lora_rank: int = 16  # (4)
    lora_targets: str = "qk"  # projections of all attention modules; paper: qkv (4.1), code: qkvo
    lora_steps: int = 80  # (4)
    lora_batch: int = 4  # (4)
    lora_lr: float = 5e-4  # of AdamW (4)
    control_start: int = 0  # first denoising step that reads the original's keys and values (4.1)
    control_blocks: int = 2  # last up blocks that do (code); paper: 3, all that have attention (4.1)
    size: int | None = None  # shorter side to work at; None: the model's own, 512 for SD 1.5
    keep_background: bool = True  # keep the original's pixels in the unmasked region; not in the paper
    checkpointing: bool = False  # recompute activations: less memory, more time; not in the paper

    def __post_init__(self) -> None:
        for name, (least, most) in (BOUNDS | {"inversion_steps": (1, self.steps)}).items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                bound = f"at most {most}" if value > most else f"at least {least}"
                raise ValueError(f"{name} must be {bound}, got {value}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @classmethod
    def paper(cls) -> "EditConfig":
        """The paper to the letter."""
        return cls(
            # Hundreds of times larger than the mean, so that the mask term hardly holds the background.
            motion_loss="sum",  # (eq. 3)
            lora_targets="qkv",  # (4.1); the course notes that this project began with say qk
            control_blocks=3,  # (4.1)
            keep_background=False,
        )

    @classmethod
    def official(cls) -> "EditConfig":
        """The authors' program."""
        return cls(lora_targets="qkvo", keep_background=False)

    @classmethod
    def thorough(cls) -> "EditConfig":
        """Longer drags that arrive more often, for about twice the time."""
        # Held to the original (GoodDrag, arXiv 2404.07206), content keeps its look over many updates.
        return cls(drag_steps=160, motion_step=2.0, motion_reference="start")


MOST = 1_000_000  # larger than any sensible value
BOUNDS = {  # least and most
    **dict.fromkeys(("drag_steps", "drag_lr", "motion_radius", "motion_step", "track_radius"), (0, MOST)),
    **dict.fromkeys(("mask_weight", "tolerance", "lora_steps", "lora_lr", "control_start"), (0, MOST)),
    **dict.fromkeys(("steps", "lora_rank"), (1, MOST)),
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
