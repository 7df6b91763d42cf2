"""The denoising loop: its state, one step, the whole."""
