"""Measuring: the networks beside the reference libraries, and how good an edit is.

Run as `python -m minidrag.bench SUBCOMMAND`.
"""
