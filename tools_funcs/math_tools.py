"""Two small tools for first experiments."""


def add(a: int, b: int) -> str:
    """Add two integers.

    Args:
        a: The first number.
        b: The second number.

    Returns:
        The sum, as "Sum: 42".
    """
    return f"Sum: {a + b}"


def multiply(a: int, b: int) -> str:
    """Multiply two integers.

    Args:
        a: The first factor.
        b: The second factor.

    Returns:
        The product, as "Product: 72".
    """
    return f"Product: {a * b}"


TOOL_FUNCTIONS = [add, multiply]
