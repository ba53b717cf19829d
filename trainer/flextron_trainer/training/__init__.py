"""Training of an elastic model at many sizes at once."""
