"""What a trained model does with rows that it is asked, and how its figures compare."""
