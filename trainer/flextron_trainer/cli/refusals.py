"""Refusals of the command, whose modules wait for no library."""


def invalid(argument: str, value: object, rule: str, remedy: str) -> ValueError:
    """Build the error as `modeling_flextron.errors.invalid` does, which is imported only when something is refused."""
    from modeling_flextron.errors import invalid as build

    return build(argument, value, rule, remedy)
