"""Policy-gradient training on the bundled tasks."""
