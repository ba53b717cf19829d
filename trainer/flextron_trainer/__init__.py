"""Convert, train, evaluate and publish elastic models."""

from .arguments import FlextronTrainingArguments
from .convert import convert
from .trainer import FlextronTrainer

__all__ = ["FlextronTrainer", "FlextronTrainingArguments", "convert"]
