"""Bytes on a wire <-> named values, each layout declared once with construct. No I/O and no policy."""
