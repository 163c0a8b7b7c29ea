"""Stubs of the exercises, which `python -m minidrag.course new` copies; each is a file to be read alone."""
