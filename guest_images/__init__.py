"""Guests: kernels from Debian, the initramfs they boot, and the agent inside."""
