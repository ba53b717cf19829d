"""From a trained model to an elastic one."""
