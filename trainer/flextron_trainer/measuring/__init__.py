"""Time and memory of every size on a machine."""
