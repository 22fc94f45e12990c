"""The errors of making and using guests.

GuestError
├── ImageError             a guest cannot be made
│   ├── ElfError               an ELF file or kernel module is not what it should be
│   ├── KernelError            a kernel cannot be found, is not one, or cannot be unpacked
│   ├── GuestFileError         a file that is to be put into a guest cannot be
│   └── ModuleMissingError     a kernel lacks a module, or its modules depend on each other in a circle
└── AgentError             a call to the agent inside a guest failed
    ├── AgentRefusedError      the agent answered with an error
    ├── AgentTimeoutError      no answer within the deadline; the guest may still be alive
    ├── AgentGoneError         the connection ended: the guest died, or powered off
    └── AgentGarbageError      the port carries too much that is not the agent's protocol
"""

from __future__ import annotations


class GuestError(Exception):
    """Base of all errors of this package."""

    exit_code = 2


class ImageError(GuestError):
    """A guest cannot be made."""


class ElfError(ImageError):
    """An ELF file or kernel module is not what it should be."""


class KernelError(ImageError):
    """A kernel cannot be found, is not one, or cannot be unpacked."""


class GuestFileError(ImageError):
    """A file that is to be put into a guest cannot be."""


class ModuleMissingError(ImageError):
    """A kernel lacks a module that the guest needs, or its modules cannot be put in order."""


class AgentError(GuestError):
    """A call to the agent inside a guest failed."""


class AgentRefusedError(AgentError):
    """The agent answered with an error."""


class AgentTimeoutError(AgentError):
    """No answer came within the deadline; the guest may still be alive."""


class AgentGoneError(AgentError):
    """The connection ended: the guest died, or powered off."""


class AgentGarbageError(AgentError):
    """The port carries too much that is not the agent's protocol."""
