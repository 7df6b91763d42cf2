"""Full-size forwards on a GPU, in their loop."""
