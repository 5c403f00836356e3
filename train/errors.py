"""The one exception for what the user can mend; the door prints it after `error:` and exits with 2."""


class UserError(Exception):
    """A fault in the recipe, the data, the template or the machine that the person at the keyboard can mend.

    The message is one paragraph without the leading `error:`. It names the file, key or row, says what is allowed
    and what to write instead.
    """
