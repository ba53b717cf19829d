"""Models of one size for other programs, and checks of what is published."""
