"""The device: a virtio-balloon that runs outside the VMM, as a vhost-user backend.

Imports nothing of qmp_glue, guest_images or balloonlab.
"""

__version__ = "0.1.0"
