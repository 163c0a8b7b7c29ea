"""Other people's model files to the layout that minidrag reads: `python -m weights_convert --help`."""
