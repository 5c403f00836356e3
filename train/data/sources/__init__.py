"""Sources: files and data sets -> rows -> conversations."""
