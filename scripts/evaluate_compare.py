"""x."""
def add_to(commands):
    """x."""
