"""Training: the masked-diffusion loss, a resumable loop on optax and Orbax, and tasks that can be verified."""

from djax.train.loss import Batch, Losses, LossWeights, masked_diffusion_loss, row_losses, sample_masks

__all__ = ["Batch", "LossWeights", "Losses", "masked_diffusion_loss", "row_losses", "sample_masks"]
