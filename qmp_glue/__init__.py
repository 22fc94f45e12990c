"""QEMU under QMP: find or fetch a capable binary, build its command line, run it, drive it, inspect it.

This file imports nothing: scripts/demo runs qmp_glue.debian before anything is installed.
"""
