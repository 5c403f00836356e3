"""TODO datagen."""
