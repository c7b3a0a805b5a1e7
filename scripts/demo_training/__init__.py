"""How the demo model is trained: `run.py` the state of a run, then the VAE, the denoiser and the checkpoints."""
