"""What can go wrong in the lab, told apart by who has to look at it.

* :exc:`LabError` - the lab can't do what was asked; one sentence with the cause and the remedy
    * :exc:`LostVMError` - the machine ended, panicked or stopped answering; no verdict on the test
* :exc:`GuestCallError` - the machine is fine, a function in the guest raised: the test fails
"""

from __future__ import annotations

__all__ = ["GuestCallError", "LabError", "LostVMError"]


class LabError(Exception):
    """The lab can't do what was asked."""


class LostVMError(LabError):
    """The virtual machine ended, panicked or stopped answering.

    ``console`` is the end of what the guest's kernel printed.
    """

    def __init__(self, message: str, console: str = "") -> None:
        super().__init__(message)
        self.console = console

    def __str__(self) -> str:
        """Show the end of the console below the message: it usually holds the reason."""
        message = super().__str__()
        return f"{message}\n--- console ---\n{self.console}" if self.console else message


class GuestCallError(AssertionError):
    """A function called in the guest raised; the text is its traceback there."""
