"""Experiments on guests: boot, drive, measure, plot. Imports hostdev, qmp_glue and guest_images."""
