"""Shipped test machinery: the driver side of the ring, a guest driver, the model mapper."""
