"""Wire types and constants only, one module per standard; no algorithms.

Structures are little-endian ctypes types with natural layout (no ``_pack_``).
Ranges keep the inclusive ends of the wire.
"""
