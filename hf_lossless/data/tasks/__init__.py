"""What a task's rows look like, how they become a model's inputs, and how its outputs are judged; one file per task."""
