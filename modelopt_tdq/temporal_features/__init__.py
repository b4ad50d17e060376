"""Temporal features: what a diffusion model computes from the time alone, known before it runs."""
