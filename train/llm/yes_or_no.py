"""What a model says that was asked for a yes or a no."""


def says_no(reply: str) -> bool | None:
    """Whether a reply says no; None where it says neither."""
    words = [word.strip("*_.,:;!\"'`()").casefold() for word in reply.split()]
    first = next((word for word in words if word in ("yes", "no")), None)
    return None if first is None else first == "no"
