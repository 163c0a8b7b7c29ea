"""The same edit with a mouse: a page in the browser, served by this machine for this machine."""
