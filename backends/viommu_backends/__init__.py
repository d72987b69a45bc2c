"""Memory mappers for host IOMMUs and for devices in other processes."""
