"""The hierarchy of instructions: answers that keep to the system message against what the user or a text demands."""
