"""Convert model files to the layout that minidrag loads: `python -m weights_convert --help`."""
