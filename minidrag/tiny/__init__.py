"""A small model of the same classes, trained on rendered scenes."""
