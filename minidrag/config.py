"""The constants of an edit, each with where it comes from.

The defaults differ from the paper's in four fields: motion_loss, which measuring decided, lora_targets,
control_blocks and keep_background. "Paper" is arXiv 2306.14435; "code" is its authors' program.
"""

from dataclasses import dataclass

MOST = 1_000_000  # no sensible value comes near
BOUNDS = {  # the least and the most that a number may be
    "steps": (1, MOST),
    "drag_steps": (0, MOST),
    "drag_lr": (0, MOST),
    "motion_radius": (0, MOST),
    "motion_step": (0, MOST),
    "track_radius": (0, MOST),
    "mask_weight": (0, MOST),
    "tolerance": (0, MOST),
    "lora_rank": (1, MOST),
    "lora_steps": (0, MOST),
    "lora_batch": (1, 1000),  # the system ends a process that asks for far too much memory
    "lora_lr": (0, MOST),
    "control_start": (0, MOST),
    "control_blocks": (0, 4),
    "size": (8, MOST),
}
CHOICES = {
    "motion_reference": ("moving", "start"),
    "motion_loss": ("sum", "mean"),
    "lora_targets": ("qk", "qkv", "qkvo"),
}


@dataclass(frozen=True)
class EditConfig:
    """All constants of an edit. Raises ValueError for what makes no sense."""

    steps: int = 50  # of DDIM, from pure noise to picture (paper section 4)
    inversion_steps: int = 35  # so many steps up from the picture lies the latent that is edited: t = 681
    block: int = 3  # which up block's features, 1 to 4; the third has 640 channels at 64x64 (section 4)
    drag_steps: int = 80  # at most (section 4)
    drag_lr: float = 0.01  # Adam's, on the latent (section 4)
    motion_radius: int = 1  # r_1: supervised patches are 3x3 (section 4)
    motion_step: float = 1.0  # grid units that a patch is asked to go ahead (eq. 3: d_i has length 1)
    motion_reference: str = "moving"  # a patch shall look as it does now (eq. 3), or as at the "start"
    track_radius: int = 3  # r_2: handles are looked for in 7x7 (section 4)
    mask_weight: float = 0.1  # lambda, of the change outside the mask (section 4)
    tolerance: float = 2.0  # grid units at which a handle has arrived (code; paper: "reached")
    motion_loss: str = "mean"  # over channels and patch, times the area (code); "sum": eq. 3, see `paper`
    lora_rank: int = 16  # (section 4)
    lora_targets: str = "qk"  # projections of all attentions; paper: qkv (section 4.1), code: qkvo
    lora_steps: int = 80  # (section 4)
    lora_batch: int = 4  # (section 4)
    lora_lr: float = 5e-4  # AdamW's (section 4)
    control_start: int = 0  # denoising step from which on the original's keys and values are read (4.1: all)
    control_blocks: int = 2  # last up blocks in which they are (code); paper: in all three with attention
    size: int | None = None  # shorter side to work at; None: what the model was trained on, SD 1.5: 512
    keep_background: bool = True  # the original's own pixels outside the mask; not part of the paper
    checkpointing: bool = False  # less memory for more time; not part of the paper

    def __post_init__(self) -> None:
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} {value} is not possible: choose {least} to {most}")
        for name, most in (("inversion_steps", self.steps), ("block", 4)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} {getattr(self, name)} is not possible: choose 1 to {most}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not known: choose one of {', '.join(known)}"
                )

    @classmethod
    def paper(cls) -> "EditConfig":
        """The paper to the letter."""
        return cls(
            # Hundreds of times larger than the mean: the mask term hardly weighs, and the outside goes along.
            motion_loss="sum",  # (eq. 3)
            lora_targets="qkv",  # (section 4.1); the course notes that this project began from say qk
            control_blocks=3,  # all up blocks that have attention (section 4.1)
            keep_background=False,  # the paper pastes nothing
        )

    @classmethod
    def official(cls) -> "EditConfig":
        """What the authors' program does."""
        return cls(
            lora_targets="qkvo",  # value and output projections as well
            keep_background=False,  # shows what comes out of the decoder
        )

    @classmethod
    def thorough(cls) -> "EditConfig":
        """Comes further than the paper's, for about twice the time of its drag; see the README's figures."""
        return cls(
            drag_steps=160,
            motion_step=2.0,
            motion_reference="start",  # GoodDrag's: what has been pulled for long is still what it was
        )
