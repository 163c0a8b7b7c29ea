"""A course on dragging: a report of one edit, lessons, and exercises that check themselves."""
