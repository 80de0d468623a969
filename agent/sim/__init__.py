"""Simulated silicon: real report and certificate formats, signed by throw-away keys under unmistakable names. And a test KBS.

A simulated machine is a directory, so agent, broker and tests can be separate processes over the same silicon.
Chosen by name only, never a fallback; refused where a real TEE device exists; not part of a guest image.
`trustee.py` is somebody else's server as our clients see it, and the `trustee_*.py` beside it are its parts: that is why there
are more than nine files here.
"""
