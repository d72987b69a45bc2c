"""Programs that run inside the guest, on its Python and nothing else.

A module's ``__all__`` lists the functions that the host may call through the agent: they take
and return JSON values, and an exception is the test's failure.
"""
