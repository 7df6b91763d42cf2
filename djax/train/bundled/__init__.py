"""The model that comes with djax, from nothing: `python -m djax.train.bundled DIRECTORY`."""
