"""Lessons, exercises, and reports that explain an edit step by step."""

from pathlib import Path

LESSONS = Path(__file__).parent / "lessons"  # their texts and figures, and the drag of their experiments
