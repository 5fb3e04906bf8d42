"""The tasks, one file each: the columns of their rows, the inputs they make for a model, and their metrics."""
