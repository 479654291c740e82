"""Row gradients and what is done with them; the public names are in `adam_transforms`."""
