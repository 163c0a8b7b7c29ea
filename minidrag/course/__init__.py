"""Material for a class: exercises that check themselves, and what mistakes look like."""
